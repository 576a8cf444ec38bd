def show_data(s):
    print(s.shape, s.columns, s.splits, s.dropped, s.contamination)
