"""The version, where the layers below the package's face can read it."""

VERSION = "0.1.0"
