"""The factors that methods are made of: signals of records, and samplers over signals; each written once."""
