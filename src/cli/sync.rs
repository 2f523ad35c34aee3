//! `sledge sync`.

use std::future::Future;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use indicatif::ProgressBar;
use tokio::sync::watch;

use super::interrupt::Interrupt;
use super::progress::{self, number, size};
use super::store::{self, Access};
use super::{control, filter};
use crate::client::clock::World;
use crate::client::dial::RelayUrl;
use crate::client::keys::Keys;
use crate::client::link::{Link, LinkOptions};
use crate::client::mirrors::Mirror;
use crate::client::stream::{Memory, Scope, Stream};
use crate::config::{self, Config};
use crate::error::Error;
use crate::protocol::Filter;
use crate::relay::ingest::Upstream;
use crate::relay::side::{Moved, Side};
use crate::relay::{Clock, Relay};
use crate::server::control::{Answer, Equals, Request, SyncRequest};

/// How often the bar is drawn.
const DRAW_EVERY: Duration = Duration::from_millis(200);

/// How long stopping may take once everything is moved.
const STOP_TIME_MAX: Duration = Duration::from_secs(60);

/// Make the store and another relay equal
///
/// Finds out what either side lacks by comparing sums (NIP-77), not by sending everything, and moves it; a relay without
/// NIP-77 is read page by page. Requests to delete come first, events go through the rules of the store. A run that was
/// interrupted is gone on with by the next one. While `sledge serve` has the store, the relay does it.
///
/// Exit code 0: both sides have what the other gave and they take. 1: the relay could not be reached, did not answer in
/// time or cannot give all there is; what was moved until then stays.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sledge sync wss://relay.example.com --filter '{\"kinds\":[0,1,3]}'
  sledge sync ws://192.168.1.2:7777 --direction both --private --key my.nsec")]
pub struct SyncArgs {
    /// The other relay
    #[arg(value_name = "URL")]
    pub url: String,
    /// What is made equal, a JSON object (NIP-01); may be given several times [default: everything]
    #[arg(long, value_name = "FILTER")]
    pub filter: Vec<String>,
    /// Which way events go
    #[arg(long, value_enum, default_value_t = Way::Down)]
    pub direction: Way,
    /// Move private and protected events too: for two relays of your own
    #[arg(long)]
    pub private: bool,
    /// File with the secret key that is proven to the other relay (NIP-42)
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// Print the summary as JSON
    #[arg(long)]
    pub json: bool,
}

/// Which way events go, seen from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Way {
    /// From the other relay to the store
    Down,
    /// From the store to the other relay
    Up,
    /// Both
    Both,
}

impl From<Way> for config::Direction {
    fn from(way: Way) -> Self {
        match way {
            Way::Down => config::Direction::Down,
            Way::Up => config::Direction::Up,
            Way::Both => config::Direction::Both,
        }
    }
}

/// Makes both sides equal, and says what was moved.
pub fn run(args: &SyncArgs, config: Config, out: &mut impl Write) -> Result<ExitCode, Error> {
    let request = request(args)?;
    let mirror = mirror(&request, &config).map_err(Error::Usage)?;
    let config = Arc::new(config);
    let moved = match store::open_or_reach(&config)? {
        Access::Own(opened) => {
            let interrupt = Interrupt::watch()?;
            let relay = Relay::start(config.clone(), opened.store(), Clock::system());
            let relay = Arc::new(relay.map_err(|error| Error::Failed(error.to_string()))?);
            let result = by_this_process(&relay, mirror, &config, interrupt);
            let stopped = relay.stop(Instant::now() + STOP_TIME_MAX);
            let moved = result?;
            stopped.map_err(|error| store::failed(&config, error))?;
            moved
        }
        Access::Relay(_) => by_relay(&config, request)?,
    };
    let text = if args.json { super::json(&moved) } else { summary(&moved) };
    super::print(out, &text)?;
    Ok(ExitCode::SUCCESS)
}

/// The request that the arguments amount to: keys and ids as hex, the key file by its full path.
fn request(args: &SyncArgs) -> Result<SyncRequest, Error> {
    let mut filters = Vec::new();
    for asked in filter::read_all(&args.filter)? {
        filters.push(asked.filter.to_json());
    }
    let key = args.key.as_deref().map(std::path::absolute).transpose();
    let key = key.map_err(|error| Error::Usage(format!("--key: {error}")))?;
    let direction = args.direction.into();
    Ok(SyncRequest { url: args.url.clone(), filters, direction, private: args.private, key })
}

/// What is to be made equal, and with whom.
///
/// # Errors
/// What is wrong with URL, filters or key file.
pub fn mirror(request: &SyncRequest, config: &Config) -> Result<Mirror, String> {
    let url = RelayUrl::parse(&request.url).map_err(|error| error.to_string())?;
    let filters =
        request.filters.iter().map(|text| Filter::from_json(text).map_err(|error| format!("{text}: {error}")));
    let mut filters: Vec<Filter> = filters.collect::<Result<_, _>>()?;
    if filters.is_empty() {
        filters.push(Filter::default());
    }
    if filters.iter().any(|filter| filter.limit.is_some()) {
        return Err("a filter for making equal has no limit".to_owned());
    }
    let keys = request.key.as_deref().map(read_key).transpose()?;
    let answer_timeout = Duration::from_secs(config.client.answer_timeout_secs);
    let scope = Scope { filters, direction: request.direction, answer_timeout };
    Ok(Mirror { url, scope, private: request.private, keys: keys.into_iter().collect() })
}

fn read_key(file: &Path) -> Result<Keys, String> {
    Keys::read(file).map_err(|error| format!("{}: {error}", file.display()))
}

/// Makes a relay equal with another one, once.
async fn make_equal(
    relay: Arc<Relay>,
    mirror: Mirror,
    options: LinkOptions,
    told: watch::Sender<Moved>,
) -> Result<(), String> {
    let name = mirror.url.to_string();
    let upstream = Upstream { url: name.clone(), is_mirror: false };
    let named = |error: &dyn std::fmt::Display| format!("{name}: {error}");
    let link = Link::open(&mirror.url, &options, mirror.keys, &World::system()).await;
    let link = link.map_err(|error| named(&error))?;
    let side = Side::new(relay, mirror.private, upstream);
    let mut stream = Stream::new(link, side, mirror.scope, told, Memory::default());
    stream.level().await.map_err(|error| named(&error))
}

fn by_this_process(
    relay: &Arc<Relay>,
    mirror: Mirror,
    config: &Config,
    mut interrupt: Interrupt,
) -> Result<Moved, Error> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| Error::Failed(format!("cannot open sockets: {error}")))?;
    let (told, moved) = watch::channel(Moved::default());
    let work = make_equal(relay.clone(), mirror, LinkOptions::from(&config.client), told);
    let bar = progress::events("making equal", Some(0));
    let result = runtime.block_on(async {
        tokio::pin!(work);
        let mut every = tokio::time::interval(DRAW_EVERY);
        loop {
            tokio::select! {
                result = &mut work => return result,
                () = interrupt.wait() => return Err("interrupted; a second run goes on".to_owned()),
                _ = every.tick() => draw(&bar, moved.borrow().progress()),
            }
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    let moved = *moved.borrow();
    match result {
        Ok(()) => Ok(moved),
        Err(problem) => Err(Error::Failed(format!("{problem}; {}", summary(&moved).trim_end()))),
    }
}

fn draw(bar: &ProgressBar, (done, total): (u64, u64)) {
    bar.set_length(total);
    bar.set_position(done);
}

fn by_relay(config: &Config, request: SyncRequest) -> Result<Moved, Error> {
    super::say("the relay that has the store makes it equal");
    let bar = progress::events("making equal", Some(0));
    match control::ask(config, Request::Sync(request), &|done, total| draw(&bar, (done, total)))? {
        Answer::Moved(moved) => Ok(moved),
        other => Err(control::strange(&other)),
    }
}

/// `fetched 12 · sent 3 · rounds 4 · 12.0 KiB up · 30.5 KiB down`, and what else there is to say.
fn summary(moved: &Moved) -> String {
    let parts = [
        ("fetched", moved.stored, true),
        ("sent", moved.sent, true),
        ("not taken here", moved.refused, false),
        ("not taken there", moved.unwanted, false),
        ("not given", moved.missing, false),
    ];
    let told = parts.iter().filter(|(_, count, always)| *always || *count > 0);
    let mut told: Vec<String> = told.map(|(what, count, _)| format!("{what} {}", number(*count))).collect();
    told.push(format!("rounds {}", number(moved.rounds)));
    told.push(format!("{} up", size(moved.bytes_up)));
    told.push(format!("{} down", size(moved.bytes_down)));
    told.join(" · ") + "\n"
}

/// The operator's command to a running relay.
pub struct ByRelay {
    /// The relay.
    pub relay: Arc<Relay>,
}

impl Equals for ByRelay {
    fn sync(
        &self,
        asked: SyncRequest,
        told: watch::Sender<Moved>,
    ) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send>> {
        let (relay, config) = (self.relay.clone(), self.relay.config());
        Box::pin(async move {
            let mirror = mirror(&asked, &config)?;
            make_equal(relay, mirror, LinkOptions::from(&config.client), told).await
        })
    }
}
