"""Where lane jobs run; an executor forms the trial packs itself."""
