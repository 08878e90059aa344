"""One CT image: from a DICOM file to checked geometry and Hounsfield units."""
