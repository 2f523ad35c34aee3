//! What a caller of the crate can meet, and the exit code each has on the command line.

use std::io;
use std::path::PathBuf;

use crate::config::ConfigError;

/// Why a command or a call of the library did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The settings cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The system refused a file operation.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried, as it follows "cannot": `read`, `create`.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The reader of our output has gone, as in `sledge export | head`. Nobody is left to tell, so it is no failure.
    #[error("the reader of the output has gone")]
    OutputClosed,
    /// The user asked for something that cannot be asked for.
    #[error("{0}")]
    Usage(String),
    /// The work itself failed; the text says to which thing and what to do.
    #[error("{0}")]
    Failed(String),
}

impl Error {
    /// Wraps what the system said about a file; `what` follows the word "cannot".
    pub fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { what, path, source }
    }

    /// Wraps a failed write to standard output, telling a reader that has gone from a full disk.
    pub fn output(source: io::Error) -> Error {
        match source.kind() {
            io::ErrorKind::BrokenPipe => Error::OutputClosed,
            _ => Error::Io { what: "write to", path: PathBuf::from("standard output"), source },
        }
    }

    /// The exit code: 0 nothing to complain about, 1 failed, 2 asked wrongly (arguments or settings).
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::OutputClosed => 0,
            Error::Config(_) | Error::Usage(_) => 2,
            Error::Io { .. } | Error::Failed(_) => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    /// Scripts tell a wrong question from a failed run, and `| head` from both.
    #[test]
    fn exit_codes_tell_usage_from_failure() {
        let refused = Config::default().refuse("log.level", "no level");
        for (error, code) in [
            (Error::output(io::ErrorKind::BrokenPipe.into()), 0),
            (Error::output(io::ErrorKind::StorageFull.into()), 1),
            (Error::io("read", "x.jsonl")(io::ErrorKind::NotFound.into()), 1),
            (Error::Failed("no".to_owned()), 1),
            (Error::Usage("no".to_owned()), 2),
            (Error::Config(refused), 2),
        ] {
            assert_eq!(error.exit_code(), code, "{error}");
        }
    }
}
