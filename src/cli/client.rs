//! What the commands of the user's own side have in common: which profile and key, visiting relays, printing.

pub mod chat;
pub mod outbox;
pub mod settings;
pub mod training;

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde_json::Value;

use super::progress;
use crate::client::clock::World;
use crate::client::keys::Keys;
use crate::client::link::LinkOptions;
use crate::client::links::Visit;
use crate::client::outbox::OutboxError;
use crate::client::profile::ProfileOptions;
use crate::client::{Client, ClientError};
use crate::config::Config;
use crate::error::Error;
use crate::store::StoreError;

/// How long closing a profile may take. Past that the next start does it.
const CLOSE_TIME_MAX: Duration = Duration::from_secs(30);
const MIB: u64 = 1024 * 1024;

/// Which profile, whose key, which relays.
#[derive(Debug, Args)]
pub struct ProfileArgs {
    /// Directory of the profile [default: `dir` of `[client]` in the settings, else sledge-profile]
    #[arg(long, global = true, value_name = "DIR")]
    pub profile: Option<PathBuf>,
    /// File with your secret key, as `sledge key generate --out FILE` makes it [default: $SLEDGE_KEY, else `key` of
    /// `[client]` in the settings]
    #[arg(long, global = true, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// A relay that keeps your events, instead of `relays` of `[client]` in the settings; may be repeated
    #[arg(long, global = true, value_name = "URL")]
    pub relay: Vec<String>,
    /// Ask and tell no relay: what you write waits in the outbox
    #[arg(long, global = true)]
    pub offline: bool,
    /// Print JSON
    #[arg(long, global = true)]
    pub json: bool,
}

/// When relays are visited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Visiting {
    /// Before the work, which reads.
    Before,
    /// After the work, which writes.
    After,
    /// Before and after: what is written depends on what the relays have.
    Around,
    /// Not at all.
    Never,
}

impl ProfileArgs {
    /// Brings this device up to date as far as relays can be reached, then does what reads.
    fn read<T>(&self, config: &Config, work: impl FnOnce(&Client) -> Result<T, Error>) -> Result<T, Error> {
        self.run(config, if self.offline { Visiting::Never } else { Visiting::Before }, work)
    }

    /// Does what writes, which is durable then, and brings it to relays as far as they can be reached.
    fn write<T>(&self, config: &Config, work: impl FnOnce(&Client) -> Result<T, Error>) -> Result<T, Error> {
        self.run(config, if self.offline { Visiting::Never } else { Visiting::After }, work)
    }

    /// Brings this device up to date as far as relays can be reached, does what writes in view of that, and brings it to
    /// them.
    fn exchange<T>(&self, config: &Config, work: impl FnOnce(&Client) -> Result<T, Error>) -> Result<T, Error> {
        self.run(config, if self.offline { Visiting::Never } else { Visiting::Around }, work)
    }

    /// Does what concerns this device only.
    fn here<T>(&self, config: &Config, work: impl FnOnce(&Client) -> Result<T, Error>) -> Result<T, Error> {
        self.run(config, Visiting::Never, work)
    }

    fn run<T>(
        &self,
        config: &Config,
        visiting: Visiting,
        work: impl FnOnce(&Client) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let (mut work, mut done) = (Some(work), None);
        self.drive(config, visiting, &mut |client| {
            done = work.take().map(|work| work(client)).transpose()?;
            Ok(())
        })?;
        Ok(done.expect("the work is done once"))
    }

    /// Apart from [`Self::run`], so that it is compiled once and not for every command.
    fn drive(
        &self,
        config: &Config,
        visiting: Visiting,
        work: &mut dyn FnMut(&Client) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let client = self.open(config)?;
        super::remote::block_on(async {
            if matches!(visiting, Visiting::Before | Visiting::Around) {
                visit(&client, config).await;
            }
            let done = work(&client);
            let is_due = match visiting {
                Visiting::After => true,
                // Where nothing was written, the first visit has done everything.
                Visiting::Around => client.status().borrow().waiting > 0,
                Visiting::Before | Visiting::Never => false,
            };
            if is_due && done.is_ok() {
                visit(&client, config).await;
            }
            let closed = client.close(CLOSE_TIME_MAX).await;
            done?;
            closed.map_err(store_failed)
        })
    }

    fn open(&self, config: &Config) -> Result<Client, Error> {
        let keys = self.keys(config)?;
        let client = &config.client;
        let relays = if self.relay.is_empty() { client.relays.clone() } else { self.relay.clone() };
        for url in &relays {
            crate::client::dial::RelayUrl::parse(url).map_err(|error| Error::Usage(error.to_string()))?;
        }
        let options = ProfileOptions {
            dir: self.profile.clone().unwrap_or_else(|| client.dir().to_owned()),
            relays,
            training_relays: client.training_relays.clone(),
            outbox_bytes_max: client.outbox_mb_max.saturating_mul(MIB),
            memory_bytes: client.memory_mb.saturating_mul(MIB as usize),
        };
        let opened = Client::open(&options, keys, LinkOptions::from(client), World::system()).map_err(store_failed)?;
        let owner = format!("a sledge command (process {})", std::process::id());
        opened.profile().cache().describe_owner(&owner).map_err(store_failed)?;
        Ok(opened)
    }

    fn keys(&self, config: &Config) -> Result<Keys, Error> {
        let from_env = std::env::var_os("SLEDGE_KEY").filter(|file| !file.is_empty()).map(PathBuf::from);
        let named = || Some(PathBuf::from(&config.client.key)).filter(|file| !file.as_os_str().is_empty());
        let file = self.key.clone().or(from_env).or_else(named).ok_or_else(|| {
            Error::Usage(
                "no secret key is named; make one with `sledge key generate --out my.nsec`, and name its file with --key, \
                 $SLEDGE_KEY or `key` of `[client]` in the settings"
                    .to_owned(),
            )
        })?;
        Keys::read(&file).map_err(|error| Error::Usage(format!("{}: {error}", file.display())))
    }
}

/// Visits all relays, with a sign of life on a terminal; what could not be done is said.
async fn visit(client: &Client, config: &Config) -> bool {
    let bar = progress::events("exchanging events with relays", None);
    let mut status = client.status();
    let watching = async {
        while status.changed().await.is_ok() {
            let moved = status.borrow_and_update().relays.values().map(|relay| relay.fetched + relay.uploaded).sum();
            bar.set_position(usize_to_u64(moved));
            bar.tick();
        }
        std::future::pending::<()>().await;
    };
    let visits = tokio::select! {
        visits = client.visit_relays(config.client.visit_timeout()) => visits,
        () = watching => unreachable!("it never ends"),
    };
    bar.finish_and_clear();
    let mut all_settled = true;
    for (relay, visit) in visits {
        let problem = match visit {
            Visit::Settled => continue,
            Visit::Unreachable(reason) => format!("{relay} {reason}; what it is owed waits for the next time"),
            Visit::Unfinished(reason) => format!("{relay} {reason}; the rest waits for the next time"),
        };
        super::say(&problem);
        all_settled = false;
    }
    let dead = client.status().borrow().dead;
    if dead > 0 {
        super::say(&format!("relays refuse {dead} of what you wrote; `sledge outbox dead` says why"));
        all_settled = false;
    }
    all_settled
}

fn usize_to_u64(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

/// What the client said, as the user's error: wrong questions apart from failures.
fn failed(error: ClientError) -> Error {
    match error {
        ClientError::Outbox(OutboxError::NoRelay(why)) => {
            Error::Usage(format!("{why}; name relays there, or with --relay"))
        }
        ClientError::Store(error) => store_failed(error),
        ClientError::Outbox(OutboxError::Store(error)) => store_failed(error),
        ClientError::Chat(_)
        | ClientError::NotContributed(_)
        | ClientError::NotThere(_)
        | ClientError::StaysHere(_) => Error::Usage(error.to_string()),
        error => Error::Failed(error.to_string()),
    }
}

fn store_failed(error: StoreError) -> Error {
    Error::Failed(match error {
        StoreError::DiskFull => "the disk that holds the profile is full; free some space".to_owned(),
        error => error.to_string().replace("--store", "--profile"),
    })
}

/// Seconds since 1970 as a person reads them, UTC.
fn date(secs: u64) -> String {
    let date = httpdate::fmt_http_date(std::time::UNIX_EPOCH + Duration::from_secs(secs.min(253_402_300_799)));
    // "Sun, 06 Nov 1994 08:49:37 GMT"
    date.get(5..22).unwrap_or(&date).to_owned()
}

/// A text from the command line, or from standard input for `-`.
fn text_or_stdin(text: &str) -> Result<String, Error> {
    if text != "-" {
        return Ok(text.to_owned());
    }
    let mut all = String::new();
    // One event holds less; what is longer is refused with a reason later.
    let limit = 1024 * 1024;
    std::io::Read::read_to_string(&mut std::io::Read::take(std::io::stdin().lock(), limit), &mut all)
        .map_err(Error::io("read a text from", "standard input"))?;
    Ok(all.strip_suffix('\n').map_or(all.clone(), str::to_owned))
}

/// A line of JSON.
fn json_line(value: &Value) -> String {
    format!("{value}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Dates as people read them, also at the ends of time.
    #[test]
    fn dates_are_readable() {
        assert_eq!(date(784_111_777), "06 Nov 1994 08:49");
        assert_eq!(date(0), "01 Jan 1970 00:00");
        assert_eq!(date(u64::MAX), "31 Dec 9999 23:59");
    }
}
