//! Commands to the relay that has the store, through its control socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::config::Config;
use crate::error::Error;
use crate::server::control::{Answer, FILE, Request};

/// How long the relay may be silent: it gives a sign of life every half second.
const SILENCE_TIME_MAX: Duration = Duration::from_secs(60);

/// Asks the relay that has the store and returns its last answer; `progress` is told bytes done, and in all.
///
/// # Errors
/// [`Error::Failed`] when it cannot be reached, goes away or refuses.
pub fn ask(config: &Config, request: Request, progress: &dyn Fn(u64, u64)) -> Result<Answer, Error> {
    let path = config.control_dir().join(FILE);
    let failed = |what: &str| Error::Failed(format!("the relay that has the store {what} ({})", path.display()));
    let socket = UnixStream::connect(&path).map_err(|error| {
        failed(&format!("cannot be reached: {error}; stop it to have this command work on the store itself"))
    })?;
    let converse = || -> std::io::Result<Option<Answer>> {
        socket.set_read_timeout(Some(SILENCE_TIME_MAX))?;
        socket.set_write_timeout(Some(SILENCE_TIME_MAX))?;
        (&socket).write_all(format!("{}\n", serde_json::to_string(&request)?).as_bytes())?;
        for line in BufReader::new(&socket).lines() {
            match serde_json::from_slice(line?.as_bytes())? {
                Answer::Progress { done, total } => progress(done, total),
                last => return Ok(Some(last)),
            }
        }
        Ok(None)
    };
    match converse() {
        Ok(Some(Answer::Error(problem))) => Err(failed(&format!("did not do it: {problem}"))),
        Ok(Some(answer)) => Ok(answer),
        Ok(None) => Err(failed("went away or has too many commands to do")),
        Err(error) => Err(failed(&format!("does not answer: {error}"))),
    }
}

/// The error for an answer to something else than was asked.
pub fn strange(answer: &Answer) -> Error {
    Error::Failed(format!("the relay that has the store answers in a way this sledge does not know: {answer:?}"))
}
