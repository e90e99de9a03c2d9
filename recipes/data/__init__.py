"""What recipes are run on: text, tables, fictitious persons, small models and cheap filters."""
