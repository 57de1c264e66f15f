"""A finished study's winner in the forms that other programs take: folders, configuration files, commands."""
