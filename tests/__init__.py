"""The tests of ddb."""
