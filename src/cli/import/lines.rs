//! A file of lines, read in chunks of bounded size.

use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::ops::Range;

use flate2::bufread::MultiGzDecoder;

/// How a gzip file begins.
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// Bytes after which a chunk is complete; its last line may exceed it.
const CHUNK_BYTES: usize = 256 * 1024;

const BUFFER_BYTES: usize = 256 * 1024;

/// The text of a file.
pub type Text = BufReader<Box<dyn Read + Send>>;

/// The text of a plain or gzip file: which it is, its first bytes tell.
///
/// # Errors
/// When nothing can be read.
pub fn unpacked(mut input: impl Read + Send + 'static) -> io::Result<Text> {
    let mut magic = Vec::new();
    input.by_ref().take(GZIP_MAGIC.len() as u64).read_to_end(&mut magic)?;
    let is_gzip = magic == GZIP_MAGIC;
    let whole = Cursor::new(magic).chain(input);
    let input: Box<dyn Read + Send> = match is_gzip {
        true => Box::new(MultiGzDecoder::new(BufReader::with_capacity(BUFFER_BYTES, whole))),
        false => Box::new(whole),
    };
    Ok(BufReader::with_capacity(BUFFER_BYTES, input))
}

/// Some successive lines.
#[derive(Debug, Default)]
pub struct Chunk {
    text: Vec<u8>,
    lines: Vec<Place>,
}

#[derive(Debug)]
struct Place {
    number: u64,
    /// Where the line lies in `text`; `None` if it was too long to be kept.
    range: Option<Range<usize>>,
}

/// A line that is longer than allowed.
#[derive(Debug, PartialEq, Eq)]
pub struct TooLong;

impl Chunk {
    /// The lines that are not blank, with their numbers (the first of the file is 1), without line feeds.
    pub fn lines(&self) -> impl Iterator<Item = (u64, Result<&[u8], TooLong>)> {
        self.lines.iter().map(|place| {
            let line = place.range.clone().map(|range| &self.text[range]).ok_or(TooLong);
            (place.number, line)
        })
    }
}

/// Reads chunks.
pub struct Lines {
    input: Text,
    line_bytes_max: usize,
    /// Lines seen so far.
    number: u64,
    /// Why the input cannot be read on; told once the lines before it were given out.
    failed: Option<io::Error>,
}

impl Lines {
    /// Lines of a plain or gzip file: which it is, its first bytes tell. Lines with more than `line_bytes_max` bytes are
    /// passed over.
    ///
    /// # Errors
    /// When nothing can be read.
    pub fn new(input: impl Read + Send + 'static, line_bytes_max: usize) -> io::Result<Lines> {
        Ok(Lines::of(unpacked(input)?, line_bytes_max))
    }

    /// Lines of a text.
    pub fn of(input: Text, line_bytes_max: usize) -> Lines {
        Lines { input, line_bytes_max, number: 0, failed: None }
    }

    /// The next lines; `None` at the end. A chunk is complete when it is large, or when the input would have to be
    /// waited for: what a slow writer has sent is not kept back.
    ///
    /// # Errors
    /// When the input cannot be read on; everything before that was given out.
    pub fn next_chunk(&mut self) -> io::Result<Option<Chunk>> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        let mut chunk = Chunk::default();
        loop {
            match self.next_line(&mut chunk) {
                Ok(true) => {}
                Ok(false) => return Ok((!chunk.lines.is_empty()).then_some(chunk)),
                Err(error) if chunk.lines.is_empty() => return Err(error),
                Err(error) => {
                    self.failed = Some(error);
                    return Ok(Some(chunk));
                }
            }
            let must_wait = self.input.buffer().is_empty() && !chunk.lines.is_empty();
            if must_wait || chunk.text.len() >= CHUNK_BYTES {
                return Ok(Some(chunk));
            }
        }
    }

    /// Takes one line into the chunk unless it is blank; false at the end.
    fn next_line(&mut self, chunk: &mut Chunk) -> io::Result<bool> {
        let start = chunk.text.len();
        let (mut bytes, mut fits) = (0, true);
        loop {
            let buffer = match self.input.fill_buf() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                buffer => buffer?,
            };
            if buffer.is_empty() && bytes == 0 {
                return Ok(false);
            }
            let feed = memchr::memchr(b'\n', buffer);
            let part = &buffer[..feed.unwrap_or(buffer.len())];
            fits = fits && chunk.text.len() - start + part.len() <= self.line_bytes_max;
            if fits {
                chunk.text.extend_from_slice(part);
            }
            let at_end = feed.is_some() || buffer.is_empty();
            let used = feed.map_or(buffer.len(), |feed| feed + 1);
            bytes += used;
            self.input.consume(used);
            if at_end {
                break;
            }
        }
        self.number += 1;
        let range = start..chunk.text.len();
        if !fits {
            chunk.text.truncate(start);
            chunk.lines.push(Place { number: self.number, range: None });
        } else if !chunk.text[range.clone()].trim_ascii().is_empty() {
            chunk.lines.push(Place { number: self.number, range: Some(range) });
        } else {
            chunk.text.truncate(start);
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    /// Hands out its parts one by one, then fails if told so.
    struct Parts(Vec<io::Result<&'static str>>);

    impl Read for Parts {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.0.is_empty() {
                return Ok(0);
            }
            let part = self.0.remove(0)?;
            let used = part.len().min(buffer.len());
            buffer[..used].copy_from_slice(&part.as_bytes()[..used]);
            if used < part.len() {
                self.0.insert(0, Ok(&part[used..]));
            }
            Ok(used)
        }
    }

    fn all(mut lines: Lines) -> (Vec<(u64, String)>, Option<io::Error>) {
        let mut found = Vec::new();
        loop {
            match lines.next_chunk() {
                Ok(Some(chunk)) => found.extend(chunk.lines().map(|(number, line)| {
                    (number, line.map_or("too long".to_owned(), |line| String::from_utf8(line.to_vec()).unwrap()))
                })),
                Ok(None) => return (found, None),
                Err(error) => return (found, Some(error)),
            }
        }
    }

    #[track_caller]
    fn check(input: impl Read + Send + 'static, expected: &[(u64, &str)]) {
        let (found, error) = all(Lines::new(input, 5).unwrap());
        assert!(error.is_none(), "{error:?}");
        let found: Vec<(u64, &str)> = found.iter().map(|(number, line)| (*number, line.as_str())).collect();
        assert_eq!(found, expected);
    }

    fn gzip(text: &str) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap()
    }

    /// Numbers count every line, blank and over-long ones too; the last line needs no line feed.
    #[test]
    fn lines_have_the_numbers_that_an_editor_shows() {
        let text = "one\n\n \r\nfive5\nsix666\n7\n\n";
        check(text.as_bytes(), &[(1, "one"), (4, "five5"), (5, "too long"), (6, "7")]);
        check(Cursor::new(gzip(text)), &[(1, "one"), (4, "five5"), (5, "too long"), (6, "7")]);
        check("a\nb".as_bytes(), &[(1, "a"), (2, "b")]);
        check("a\n123456".as_bytes(), &[(1, "a"), (2, "too long")]);
        for empty in ["", "\n", "\n\n"] {
            check(empty.as_bytes(), &[]);
        }
    }

    /// Reads that end anywhere make no difference.
    #[test]
    fn lines_may_come_in_any_pieces() {
        let parts = ["o", "n", "e\ntw", "o\n123", "4567", "8\nx", "\n"];
        check(Parts(parts.map(Ok).into()), &[(1, "one"), (2, "two"), (3, "too long"), (4, "x")]);
    }

    /// Files of several gzip members, as `cat a.gz b.gz` makes them, are read to the end.
    #[test]
    fn every_member_of_a_gzip_file_is_read() {
        let both = [gzip("a\nb"), gzip("c\nd\n")].concat();
        check(Cursor::new(both), &[(1, "a"), (2, "bc"), (3, "d")]);
    }

    /// What was read before a failure is given out; then the failure is told.
    #[test]
    fn lines_before_a_failure_are_given_out() {
        let broken = Parts(vec![Ok("one\ntwo\nthr"), Err(io::Error::other("unplugged"))]);
        let (found, error) = all(Lines::new(broken, 5).unwrap());
        assert_eq!(found.len(), 2);
        assert_eq!(error.unwrap().to_string(), "unplugged");

        let text: String = (0..9_999).map(|n| format!("{n}\n")).collect();
        let whole = gzip(&text);
        let cut = Cursor::new(whole[..whole.len() / 2].to_vec());
        let (found, error) = all(Lines::new(cut, 5).unwrap());
        assert!(found.len() > 100 && error.is_some(), "{} lines, {error:?}", found.len());
    }

    /// A line that somebody has sent is given out before the next one comes.
    #[test]
    fn a_slow_writers_line_is_not_kept_back() {
        let mut lines = Lines::new(Parts(vec![Ok("a\n"), Ok("b\n"), Ok("c\n")]), 5).unwrap();
        for _ in 0..3 {
            assert_eq!(lines.next_chunk().unwrap().unwrap().lines().count(), 1);
        }
        assert!(lines.next_chunk().unwrap().is_none());
    }

    /// A long file comes in chunks of bounded size.
    #[test]
    fn chunks_are_bounded() {
        let text = "12345\n".repeat(200_000);
        let mut lines = Lines::new(Cursor::new(text), 5).unwrap();
        let mut count = 0;
        while let Some(chunk) = lines.next_chunk().unwrap() {
            assert!(chunk.text.len() <= CHUNK_BYTES + 5);
            count += chunk.lines().count();
        }
        assert_eq!(count, 200_000);
    }
}
