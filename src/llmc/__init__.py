from llmc._llmc import Error
