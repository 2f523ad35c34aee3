//! The operator's door: a socket in the data directory through which commands reach the relay that has the store.
//!
//! One request line a connection, answered by lines of JSON; see [`Request`] and [`Answer`]. Only the relay's own user
//! (and root) may open it. A peer that is slow, or sends something else, costs a bounded line, one of a few places and a
//! bounded time.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use super::{Shared, admin, handover};
use crate::config::Direction;
use crate::protocol::Filter;
use crate::relay::counters::Figures;
use crate::relay::explain::Measured;
use crate::relay::policy::admin::Call;
use crate::relay::policy::methods::Caller;
use crate::relay::querylog::QueryFigures;
use crate::relay::side::Moved;
use crate::store::StoreStats;
use crate::store::compact::CompactReport;

/// The socket, in the data directory.
pub const FILE: &str = "control.sock";

/// Connections at a time; more are closed at once.
const PEERS_MAX: usize = 8;
/// Bytes of a request line.
const REQUEST_BYTES_MAX: u64 = 512 * 1024;
/// From connecting to a complete request line, and for taking one line of an answer.
const PEER_TIME_MAX: Duration = Duration::from_secs(5);
/// Time between two lines of progress, which are also the sign of life.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);
/// Time left for the last answers when the relay stops.
const LAST_ANSWERS_TIME_MAX: Duration = Duration::from_secs(1);

/// What can be asked for, one JSON object on one line: `{"command":"status"}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Free what removed events take on the disk, at the pace of a serving relay.
    Compact,
    /// Figures about relay and store.
    Status,
    /// A call of the management API (NIP-86), by the operator.
    Manage {
        /// The method.
        method: String,
        /// Its parameters.
        params: Vec<Value>,
    },
    /// Run these filters and tell their plans and costs.
    Explain {
        /// Each the JSON of a filter.
        filters: Vec<String>,
    },
    /// Pass the listening sockets on ([`Answer::Listener`]), then stop.
    HandOver,
    /// The secret by which a WebSocket connection is the operator's: as the `Authorization` header, see [`crate::auth::pass`].
    Pass,
    /// Make this relay and another one equal, once.
    Sync(SyncRequest),
}

/// What is to be made equal with which relay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncRequest {
    /// The other relay.
    pub url: String,
    /// Filters as JSON.
    pub filters: Vec<String>,
    /// Which way events go.
    pub direction: Direction,
    /// Whether private and protected events go too.
    pub private: bool,
    /// File with the secret key that is proven to the other relay.
    pub key: Option<PathBuf>,
}

/// What makes this relay equal with others. The client does, whom the server does not know.
pub trait Equals: Send + Sync {
    /// Makes it equal; `told` gets the figures as they grow. Ends early when dropped.
    fn sync(
        &self,
        asked: SyncRequest,
        told: watch::Sender<Moved>,
    ) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;
}

/// A line of an answer. Any number of `progress`, then one of the others.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// How far a compaction has come: bytes of the old log. Repeated as a sign of life.
    Progress {
        /// Looked at.
        done: u64,
        /// In all; 0 when not known yet.
        total: u64,
    },
    /// What a compaction came to; none where the store needs none.
    Report(Option<CompactReport>),
    /// The figures.
    Status(Box<Status>),
    /// What was moved.
    Moved(Moved),
    /// What a management call came to.
    Result(Value),
    /// Plans and costs, in the order of the filters.
    Explained(Vec<Measured>),
    /// The listening sockets come beside this line, the encrypted one behind the other; see [`super::handover`].
    Listener,
    /// The secret in text.
    Pass(String),
    /// Why there is no other answer.
    Error(String),
}

/// Figures about a running relay.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Seconds since the relay started.
    pub uptime_secs: u64,
    /// Clients connected.
    pub connections: usize,
    /// Their open subscriptions.
    pub subscriptions: usize,
    /// Addresses that are shut out for garbage.
    #[serde(default)]
    pub banned: usize,
    /// Why the store takes no writes; none while it does.
    #[serde(default)]
    pub problem: Option<String>,
    /// What was counted since the start.
    #[serde(default)]
    pub figures: Figures,
    /// What queries cost, and the last slow ones.
    #[serde(default)]
    pub queries: QueryFigures,
    /// What waits, and what room there is.
    #[serde(default)]
    pub queues: Queues,
    /// The store's figures.
    #[serde(flatten)]
    pub stats: StoreStats,
}

/// What waits in a running relay, and what room there is.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Queues {
    /// Events that wait for the writer.
    pub writer_events: usize,
    /// Their bytes.
    pub writer_bytes: usize,
    /// Bytes free on the disk that holds the store, where that is known.
    pub disk_free_bytes: Option<u64>,
}

/// The listening socket.
pub(super) struct Control {
    path: PathBuf,
    accepting: JoinHandle<JoinSet<()>>,
}

impl Control {
    /// Listens in `dir`, which this process must own: a socket that is there is a former owner's and is replaced.
    pub(super) fn start(dir: &Path, shared: Arc<Shared>, stopping: watch::Receiver<bool>) -> io::Result<Control> {
        let path = dir.join(FILE);
        let unready = dir.join("control.new");
        remove_file(&unready)?;
        let listener = UnixListener::bind(&unready)?;
        fs::set_permissions(&unready, fs::Permissions::from_mode(0o600))?;
        fs::rename(&unready, &path)?;
        Ok(Control { path, accepting: tokio::spawn(accept(listener, shared, stopping)) })
    }

    /// Waits a little for the last answers, and takes the socket away. To be called when the relay has stopped.
    pub(super) async fn close(self) {
        if let Err(error) = remove_file(&self.path) {
            tracing::debug!(%error, "the control socket stays");
        }
        let Ok(mut peers) = self.accepting.await else { return };
        let answered = async { while peers.join_next().await.is_some() {} };
        let _ = timeout(LAST_ANSWERS_TIME_MAX, answered).await; // the rest is cut off with the set
    }
}

fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

async fn accept(listener: UnixListener, shared: Arc<Shared>, mut stopping: watch::Receiver<bool>) -> JoinSet<()> {
    let mut peers = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = peers.join_next() => continue,
            _ = stopping.wait_for(|stop| *stop) => return peers,
        };
        match accepted {
            Ok((socket, _)) if peers.len() < PEERS_MAX && is_allowed(&socket) => {
                let shared = shared.clone();
                peers.spawn(async move {
                    if let Err(error) = serve(socket, shared).await {
                        tracing::debug!(%error, "a control connection ended early");
                    }
                });
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "accepting a control connection failed");
                tokio::time::sleep(super::ACCEPT_PAUSE).await;
            }
        }
    }
}

/// The file's mode says so too, but not in the moment between making the socket and setting the mode.
fn is_allowed(socket: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    socket.peer_cred().is_ok_and(|peer| peer.uid() == own || peer.uid() == 0)
}

async fn serve(socket: UnixStream, shared: Arc<Shared>) -> io::Result<()> {
    let (read, mut write) = socket.into_split();
    let request = match timeout(PEER_TIME_MAX, read_request(read)).await {
        Ok(Ok(request)) => request,
        Ok(Err(problem)) => return answer(&mut write, &Answer::Error(problem)).await,
        Err(_) => return Err(io::ErrorKind::TimedOut.into()),
    };
    match request {
        Request::Compact => compact(&mut write, shared).await,
        Request::Sync(asked) => sync(&mut write, &shared, asked).await,
        Request::Pass => answer(&mut write, &Answer::Pass(shared.http.pass().text())).await,
        Request::Status => {
            // The writer may hold the figures for as long as a disk takes.
            let status = tokio::task::spawn_blocking(move || shared.status()).await.map_err(io::Error::other)?;
            answer(&mut write, &Answer::Status(Box::new(status))).await
        }
        Request::Manage { method, params } => {
            manage(&mut write, shared, Call { caller: Caller::Operator, method, params }).await
        }
        Request::Explain { filters } => {
            let explained = tokio::task::spawn_blocking(move || explain(&filters, &shared));
            answer(&mut write, &explained.await.map_err(io::Error::other)?).await
        }
        Request::HandOver => {
            let line = line_of(&Answer::Listener)?;
            let socket = write.as_ref();
            let send = || handover::send(socket, &line, &shared.passed_on);
            timeout(PEER_TIME_MAX, socket.async_io(Interest::WRITABLE, send)).await??;
            shared.handed_over.send_replace(true);
            Ok(())
        }
    }
}

/// Carries out a management call, with signs of life: a ban may have much to remove.
async fn manage(write: &mut OwnedWriteHalf, shared: Arc<Shared>, call: Call) -> io::Result<()> {
    let mut work = tokio::spawn(async move { admin::manage(&shared.relay, &shared.open, call).await });
    let mut every = tokio::time::interval(PROGRESS_EVERY);
    let last = loop {
        tokio::select! {
            result = &mut work => match result.map_err(io::Error::other)? {
                Some(Ok(result)) => break Answer::Result(result),
                Some(Err(problem)) => break Answer::Error(problem),
                None => break Answer::Error("it is stopping".to_owned()),
            },
            _ = every.tick() => answer(write, &Answer::Progress { done: 0, total: 0 }).await?,
        }
    };
    answer(write, &last).await
}

async fn read_request(read: OwnedReadHalf) -> Result<Request, String> {
    let mut line = Vec::new();
    let mut bounded = BufReader::new(read.take(REQUEST_BYTES_MAX));
    bounded.read_until(b'\n', &mut line).await.map_err(|error| error.to_string())?;
    if line.last() != Some(&b'\n') {
        return Err(format!("a request is one line of at most {REQUEST_BYTES_MAX} bytes"));
    }
    serde_json::from_slice(&line).map_err(|error| format!("this is no request: {error}"))
}

/// Compacts and tells how it goes. When the peer goes away the work goes on: it is the relay's, not the peer's.
async fn compact(write: &mut OwnedWriteHalf, shared: Arc<Shared>) -> io::Result<()> {
    let (told, progress) = watch::channel((0, 0));
    let mut work = tokio::task::spawn_blocking(move || {
        shared.relay.compact(&|done, total| {
            told.send_replace((done, total));
        })
    });
    let mut every = tokio::time::interval(PROGRESS_EVERY);
    let last = loop {
        tokio::select! {
            result = &mut work => match result.map_err(io::Error::other)? {
                Ok(report) => break Answer::Report(report),
                Err(error) => break Answer::Error(error.to_string()),
            },
            _ = every.tick() => {
                let (done, total) = *progress.borrow();
                answer(write, &Answer::Progress { done, total }).await?;
            }
        }
    };
    answer(write, &last).await
}

/// Makes the relay equal with another one. When the peer goes away it ends: a second command goes on with it.
async fn sync(write: &mut OwnedWriteHalf, shared: &Shared, asked: SyncRequest) -> io::Result<()> {
    let Some(equals) = shared.equals.get() else {
        return answer(write, &Answer::Error("this relay does not reach out to others".to_owned())).await;
    };
    let (told, moved) = watch::channel(Moved::default());
    let mut work = equals.sync(asked, told);
    let mut every = tokio::time::interval(PROGRESS_EVERY);
    let last = loop {
        tokio::select! {
            result = &mut work => match result {
                Ok(()) => break Answer::Moved(*moved.borrow()),
                Err(error) => break Answer::Error(error),
            },
            _ = every.tick() => {
                let (done, total) = moved.borrow().progress();
                answer(write, &Answer::Progress { done, total }).await?;
            }
        }
    };
    answer(write, &last).await
}

/// Filters that are run for one request; each may take as long as a query may.
const EXPLAINED_MAX: usize = 8;

fn explain(filters: &[String], shared: &Shared) -> Answer {
    let measure = |text: &String| {
        let filter = Filter::from_json(text).map_err(|error| error.to_string())?;
        shared.relay.measure(&filter).map_err(|error| error.to_string())
    };
    if filters.len() > EXPLAINED_MAX {
        return Answer::Error(format!("at most {EXPLAINED_MAX} filters at a time"));
    }
    filters.iter().map(measure).collect::<Result<_, _>>().map_or_else(Answer::Error, Answer::Explained)
}

fn line_of(answer: &Answer) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(answer).map_err(io::Error::other)?;
    line.push(b'\n');
    Ok(line)
}

async fn answer(write: &mut OwnedWriteHalf, answer: &Answer) -> io::Result<()> {
    let line = line_of(answer)?;
    timeout(PEER_TIME_MAX, write.write_all(&line)).await.map_err(io::Error::from)?
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::config::Config;
    use crate::relay::Clock;
    use crate::server::Server;
    use crate::store::memory::MemoryStore;

    async fn server(dir: &Path) -> Server {
        let mut config = Config::default();
        config.listen.set_port(0);
        let mut server = Server::start(Arc::new(config), Arc::new(MemoryStore::new()), Clock::system()).await.unwrap();
        server.listen_for_commands(dir).unwrap();
        server
    }

    /// Sends bytes and reads to the end.
    async fn ask(dir: &Path, request: &[u8]) -> String {
        let mut socket = UnixStream::connect(dir.join(FILE)).await.unwrap();
        socket.write_all(request).await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// Mode 0600; a stale socket is replaced, and the relay's own is gone when it stops.
    #[tokio::test]
    async fn the_socket_is_private_and_goes_with_the_relay() {
        let dir = tempfile::tempdir().unwrap();
        drop(std::os::unix::net::UnixListener::bind(dir.path().join(FILE)).unwrap());
        let server = server(dir.path()).await;
        let mode = fs::metadata(dir.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(ask(dir.path(), b"{\"command\":\"status\"}\n").await.contains("\"connections\":0"));
        server.stop().await.unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    /// Each request has one last line; a store without a log has nothing to compact.
    #[tokio::test]
    async fn requests_are_answered() {
        let dir = tempfile::tempdir().unwrap();
        let server = server(dir.path()).await;
        let status = ask(dir.path(), b"{\"command\":\"status\"}\nignored").await;
        match serde_json::from_str(&status).unwrap() {
            Answer::Status(status) => assert_eq!((status.subscriptions, status.stats.events), (0, 0)),
            other => panic!("{other:?}"),
        }
        let compact = ask(dir.path(), b"{\"command\":\"compact\"}\n").await;
        assert!(matches!(serde_json::from_str(compact.lines().last().unwrap()), Ok(Answer::Report(None))), "{compact}");
        server.stop().await.unwrap();
    }

    /// Garbage, half a line and too long a line are told so, in bounded memory; more peers than places are sent away,
    /// and the relay goes on.
    #[tokio::test]
    async fn strange_peers_harm_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let server = server(dir.path()).await;
        for request in
            [&b"garbage\n"[..], b"{\"command\":\"explode\"}\n", b"\xff\n", &[b'x'; REQUEST_BYTES_MAX as usize]]
        {
            let answer = ask(dir.path(), request).await;
            assert!(matches!(serde_json::from_str(&answer), Ok(Answer::Error(_))), "{answer}");
        }
        let mut silent = Vec::new();
        for _ in 0..PEERS_MAX {
            silent.push(UnixStream::connect(dir.path().join(FILE)).await.unwrap());
        }
        let mut one_more = UnixStream::connect(dir.path().join(FILE)).await.unwrap();
        assert_eq!(one_more.read(&mut [0]).await.unwrap_or(0), 0, "closed at once");
        drop(silent);
        server.stop().await.unwrap();
    }
}
