//! One relay's socket: connecting, keeping it alive, proving the user's keys (NIP-42), telling when it is over.
//!
//! In: messages as JSON text, from whoever drives the relay. Out: what the relay says, read but not judged.
//! A task of its own does the reading and writing, so that pings are answered whatever the driver is doing. Both queues
//! to it are bounded: a driver that does not read stops the relay, not this machine's memory. Never reconnects by itself:
//! [`Redial`] does, between two links.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::{HeaderMap, header};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, Message};

use super::backoff::Backoff;
use super::clock::World;
use super::dial::{About, Bytes, RelayUrl};
use super::keys::Keys;
use super::wire::Passed;
use crate::config::{self, Config};
use crate::protocol::relay_message::RelayMessage;
use crate::protocol::{EventId, Kind, Tags, message};

/// Pings and answers to challenges that wait for the socket.
const CONTROL_MAX: usize = 32;

/// How long to wait for the challenge of a relay that says it has one. Some send it only when it is needed.
const AUTH_GRACE: Duration = Duration::from_secs(3);

/// How long a goodbye may take.
const CLOSE_TIME_MAX: Duration = Duration::from_secs(1);

/// A clock that differs less from the relay's than this is right: the header tells whole seconds and was under way.
const OFFSET_IGNORED_MS: u64 = 2_000;

/// Bounds of a link.
#[derive(Clone, Copy, Debug)]
pub struct LinkOptions {
    /// From the first packet to the end of the handshake, TLS included.
    pub connect_timeout: Duration,
    /// Silence of the relay before it is pinged.
    pub idle_ping: Duration,
    /// Silence of the relay, also no pong, before the link is given up; and how long one message may take to go out.
    pub idle_timeout: Duration,
    /// How long the relay may owe an answer to a question.
    pub answer_timeout: Duration,
    /// Longest first wait before a new attempt.
    pub reconnect_first: Duration,
    /// Longest wait before any attempt.
    pub reconnect_max: Duration,
    /// Bytes of one message of the relay.
    pub message_bytes_max: usize,
    /// Messages that wait, in each direction.
    pub queue_messages_max: usize,
}

impl Default for LinkOptions {
    /// The settings' defaults.
    fn default() -> Self {
        LinkOptions::from(&Config::default().client)
    }
}

impl From<&config::Client> for LinkOptions {
    fn from(client: &config::Client) -> Self {
        LinkOptions {
            connect_timeout: Duration::from_millis(client.connect_timeout_ms),
            idle_ping: Duration::from_secs(client.idle_ping_secs),
            idle_timeout: Duration::from_secs(client.idle_timeout_secs),
            answer_timeout: Duration::from_secs(client.answer_timeout_secs),
            reconnect_first: Duration::from_millis(client.reconnect_first_ms),
            reconnect_max: Duration::from_millis(client.reconnect_max_ms),
            message_bytes_max: client.message_bytes_max,
            queue_messages_max: client.queue_messages_max,
        }
    }
}

/// Why there is no link, or no longer one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The URL is none of a relay.
    #[error("the relay URL `{url}` {problem}")]
    Url {
        /// As it was written.
        url: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// No socket, no TLS, or no WebSocket.
    #[error("cannot be reached: {0}")]
    Unreachable(String),
    /// It did not answer in time.
    #[error("does not answer")]
    Silent,
    /// It ended the connection.
    #[error("closed the connection{}", with_colon(.0))]
    Closed(String),
    /// It broke the WebSocket protocol, or the connection broke.
    #[error("went away: {0}")]
    Broken(String),
}

fn with_colon(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(": {reason}") }
}

/// What comes in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// The relay said something. Challenges, and answers to our answers, are not passed on.
    Message(RelayMessage),
    /// The keys are proven from here on: what was refused with `auth-required:` is worth another try, and what was asked
    /// before may not have been answered in full.
    Authenticated,
    /// The relay did not take the proof. Its reason.
    AuthRefused(String),
}

/// Whether the relay knows who we are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Auth {
    /// It has not asked.
    #[default]
    NotAsked,
    /// It took the proof.
    Proven,
    /// It did not. Its reason.
    Refused(String),
}

/// A connection to a relay. It ends when this is dropped.
#[derive(Debug)]
pub struct Link {
    url: RelayUrl,
    passed: Passed,
    about: About,
    clock_offset_ms: Option<i64>,
    auth: Auth,
    /// Messages that came while something else was waited for.
    held: VecDeque<Incoming>,
    /// Why it is over, once [`Link::ready`] has found that it is.
    over: Option<LinkError>,
    to: mpsc::Sender<String>,
    from: mpsc::Receiver<Result<Incoming, LinkError>>,
    task: tokio::task::JoinHandle<()>,
}

impl Link {
    /// Connects, and waits until the keys are proven where the relay says that it asks for that (NIP-11, NIP-42).
    ///
    /// # Errors
    /// [`LinkError`]; within `connect_timeout` and a few seconds.
    pub async fn open(
        url: &RelayUrl,
        options: &LinkOptions,
        keys: Arc<[Keys]>,
        world: &World,
    ) -> Result<Link, LinkError> {
        let passed = Passed::default();
        let about = url.about(options.connect_timeout, &passed);
        let shaking = timeout(options.connect_timeout, shake_hands(url, options, &passed));
        let (shaken, about) = tokio::join!(shaking, about);
        let (socket, headers) = shaken.map_err(|_| LinkError::Silent)??;
        let clock_offset_ms = clock_offset_ms(&headers, world.now_ms());
        let (to, outgoing) = mpsc::channel(options.queue_messages_max.max(1));
        let (incoming, from) = mpsc::channel(options.queue_messages_max.max(1));
        let proves = !keys.is_empty();
        let prover = Prover {
            url: url.as_str().to_owned(),
            keys,
            world: world.clone(),
            clock_offset_ms: clock_offset_ms.unwrap_or(0),
            waiting: Vec::new(),
            proven: false,
            refusal: String::new(),
        };
        let task = tokio::spawn(run(socket, outgoing, incoming, prover, *options));
        let (held, auth) = (VecDeque::new(), Auth::default());
        let url = url.clone();
        let mut link = Link { url, passed, about, clock_offset_ms, auth, held, over: None, to, from, task };
        if proves && link.about.supports(42) {
            link.wait_for_auth().await?;
        }
        Ok(link)
    }

    /// Which relay this is.
    pub fn url(&self) -> &RelayUrl {
        &self.url
    }

    /// What has passed on the wire since it was dialled, handshakes included.
    pub fn passed(&self) -> &Passed {
        &self.passed
    }

    /// What the relay tells about itself.
    pub fn about(&self) -> &About {
        &self.about
    }

    /// Milliseconds to be added to this machine's clock to have the relay's, from the `Date` header of the handshake;
    /// 0 when they agree, `None` when the relay did not tell.
    pub fn clock_offset_ms(&self) -> Option<i64> {
        self.clock_offset_ms
    }

    /// Whether the relay knows who we are, as far as [`Link::next`] has told.
    pub fn auth(&self) -> &Auth {
        &self.auth
    }

    /// Queues a message; waits while the queue is full. Can be cancelled, and then it is not queued.
    ///
    /// # Errors
    /// [`LinkError::Closed`] when the link is over; [`Link::next`] has the reason.
    pub async fn send(&self, json: String) -> Result<(), LinkError> {
        self.to.send(json).await.map_err(|_| LinkError::Closed(String::new()))
    }

    /// What comes next, however long it takes. Can be cancelled without losing anything.
    ///
    /// # Errors
    /// [`LinkError`], when the link is over.
    pub async fn next(&mut self) -> Result<Incoming, LinkError> {
        match self.held.pop_front() {
            Some(incoming) => Ok(incoming),
            None => self.receive().await,
        }
    }

    /// What has come already, if anything.
    pub fn ready(&mut self) -> Option<Incoming> {
        if let Some(incoming) = self.held.pop_front() {
            return Some(incoming);
        }
        match self.from.try_recv().ok()? {
            Ok(incoming) => Some(self.note(incoming)),
            Err(error) => {
                self.over = Some(error);
                None
            }
        }
    }

    /// As [`Link::next`], where the relay owes an answer.
    ///
    /// # Errors
    /// [`LinkError::Silent`] after `answer_timeout` too.
    pub async fn next_within(&mut self, answer_timeout: Duration) -> Result<Incoming, LinkError> {
        timeout(answer_timeout, self.next()).await.unwrap_or(Err(LinkError::Silent))
    }

    /// Says goodbye and waits, not long, until what was queued has gone out.
    pub async fn close(self) {
        drop((self.to, self.from));
        let _ = timeout(CLOSE_TIME_MAX, self.task).await;
    }

    async fn receive(&mut self) -> Result<Incoming, LinkError> {
        if let Some(error) = &self.over {
            return Err(error.clone());
        }
        let incoming = self.from.recv().await.unwrap_or_else(|| Err(LinkError::Closed(String::new())))?;
        Ok(self.note(incoming))
    }

    fn note(&mut self, incoming: Incoming) -> Incoming {
        match &incoming {
            Incoming::Authenticated => self.auth = Auth::Proven,
            Incoming::AuthRefused(reason) => self.auth = Auth::Refused(reason.clone()),
            Incoming::Message(_) => {}
        }
        incoming
    }

    async fn wait_for_auth(&mut self) -> Result<(), LinkError> {
        let until = Instant::now() + AUTH_GRACE;
        while self.auth == Auth::NotAsked && self.held.len() < self.from.max_capacity() {
            match tokio::time::timeout_at(until, self.receive()).await {
                Ok(Ok(incoming @ Incoming::Message(_))) => self.held.push_back(incoming),
                Ok(other) => drop(other?),
                Err(_) => break,
            }
        }
        Ok(())
    }
}

/// Opens links to one relay, one after the other, with a wait of full jitter after each failure.
#[derive(Debug)]
pub struct Redial {
    url: RelayUrl,
    options: LinkOptions,
    keys: Arc<[Keys]>,
    world: World,
    backoff: Backoff,
}

impl Redial {
    /// For links to `url` that prove `keys`.
    pub fn new(url: RelayUrl, options: LinkOptions, keys: Arc<[Keys]>, world: World) -> Redial {
        let backoff = Backoff::new(options.reconnect_first, options.reconnect_max);
        Redial { url, options, keys, world, backoff }
    }

    /// One attempt, without a wait.
    ///
    /// # Errors
    /// As [`Link::open`].
    pub async fn attempt(&self) -> Result<Link, LinkError> {
        Link::open(&self.url, &self.options, Arc::clone(&self.keys), &self.world).await
    }

    /// Waits before the next attempt, longer each time.
    pub async fn pause(&mut self) {
        tokio::time::sleep(self.backoff.next(self.world.chance())).await;
    }

    /// The last link has worked: the next wait is short again. To be called once a link has done what it was opened
    /// for, not as soon as it is open, or a relay that closes at once is hammered.
    pub fn worked(&mut self) {
        self.backoff.reset();
    }

    /// Attempts until there is a link; `failed` is told of each failure.
    pub async fn open(&mut self, mut failed: impl FnMut(&LinkError)) -> Link {
        loop {
            match self.attempt().await {
                Ok(link) => return link,
                Err(error) => failed(&error),
            }
            self.pause().await;
        }
    }
}

type Socket = WebSocketStream<Box<dyn Bytes>>;

async fn shake_hands(url: &RelayUrl, options: &LinkOptions, passed: &Passed) -> Result<(Socket, HeaderMap), LinkError> {
    let unreachable = |error: tungstenite::Error| LinkError::Unreachable(error.to_string());
    let request = url.as_str().into_client_request().map_err(unreachable)?;
    let socket = url.connect(passed).await?;
    let limit = Some(options.message_bytes_max);
    let config = WebSocketConfig::default().max_message_size(limit).max_frame_size(limit);
    let shaken = tokio_tungstenite::client_async_with_config(request, socket, Some(config)).await;
    let (socket, response) = shaken.map_err(unreachable)?;
    Ok((socket, response.into_parts().0.headers))
}

fn clock_offset_ms(headers: &HeaderMap, now_ms: u64) -> Option<i64> {
    let date = httpdate::parse_http_date(headers.get(header::DATE)?.to_str().ok()?).ok()?;
    let date_ms = date.duration_since(UNIX_EPOCH).or_else(|_| SystemTime::UNIX_EPOCH.elapsed()).ok()?.as_millis();
    let offset = i64::try_from(date_ms).ok()?.saturating_sub(i64::try_from(now_ms).ok()?);
    Some(if offset.unsigned_abs() < OFFSET_IGNORED_MS { 0 } else { offset })
}

/// The task: reads and writes until one of both ends.
async fn run(
    socket: Socket,
    outgoing: mpsc::Receiver<String>,
    incoming: mpsc::Sender<Result<Incoming, LinkError>>,
    prover: Prover,
    options: LinkOptions,
) {
    let (sink, stream) = socket.split();
    let (control, controls) = mpsc::channel(CONTROL_MAX);
    let ended = tokio::select! {
        ended = write(sink, outgoing, controls, options.idle_timeout) => ended,
        ended = read(stream, &incoming, control, prover, options) => ended,
    };
    if let Err(error) = ended {
        let _ = incoming.send(Err(error)).await;
    }
}

/// Writes what is queued, our own control messages first. Ends when the driver has gone.
async fn write(
    mut sink: SplitSink<Socket, Message>,
    mut outgoing: mpsc::Receiver<String>,
    mut controls: mpsc::Receiver<Message>,
    time_max: Duration,
) -> Result<(), LinkError> {
    loop {
        let next = tokio::select! {
            biased;
            Some(control) = controls.recv() => Some(control),
            message = outgoing.recv() => message.map(Message::text),
        };
        let Some(message) = next else {
            let _ = timeout(CLOSE_TIME_MAX, sink.close()).await;
            return Ok(());
        };
        timeout(time_max, sink.send(message)).await.map_err(|_| LinkError::Silent)?.map_err(broken)?;
    }
}

/// Reads until the relay ends it, breaks it or is silent for too long, or the driver has gone.
async fn read(
    mut stream: SplitStream<Socket>,
    incoming: &mpsc::Sender<Result<Incoming, LinkError>>,
    control: mpsc::Sender<Message>,
    mut prover: Prover,
    options: LinkOptions,
) -> Result<(), LinkError> {
    let mut heard = Instant::now();
    loop {
        let silence_left = options.idle_timeout.saturating_sub(heard.elapsed());
        let Ok(frame) = timeout(options.idle_ping.min(silence_left), stream.next()).await else {
            if heard.elapsed() >= options.idle_timeout {
                return Err(LinkError::Silent);
            }
            let _ = control.try_send(Message::Ping(bytes::Bytes::new()));
            continue;
        };
        let said = match frame {
            Some(Ok(Message::Text(text))) => prover.see(RelayMessage::from_json(text.as_str()), &control),
            Some(Ok(Message::Close(frame))) => {
                return Err(LinkError::Closed(frame.map(|frame| frame.reason.to_string()).unwrap_or_default()));
            }
            Some(Ok(_)) => None,
            Some(Err(error)) => return Err(broken(error)),
            None => return Err(LinkError::Closed(String::new())),
        };
        if let Some(said) = said
            && incoming.send(Ok(said)).await.is_err()
        {
            // The driver has gone; the writer says goodbye.
            std::future::pending::<()>().await;
        }
        heard = Instant::now();
    }
}

fn broken(error: tungstenite::Error) -> LinkError {
    match error {
        tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed => LinkError::Closed(String::new()),
        error => LinkError::Broken(error.to_string()),
    }
}

/// Answers challenges (NIP-42) with every key there is.
struct Prover {
    url: String,
    keys: Arc<[Keys]>,
    world: World,
    clock_offset_ms: i64,
    /// Answers that the relay has not yet judged.
    waiting: Vec<EventId>,
    proven: bool,
    refusal: String,
}

impl Prover {
    /// Takes what concerns authentication out of what the relay says.
    fn see(&mut self, said: RelayMessage, control: &mpsc::Sender<Message>) -> Option<Incoming> {
        match said {
            RelayMessage::Auth(challenge) => {
                self.answer(&challenge, control);
                None
            }
            RelayMessage::Ok { id, accepted, text } if self.waiting.contains(&id) => {
                self.waiting.retain(|waiting| *waiting != id);
                self.proven |= accepted;
                if !accepted {
                    self.refusal = text;
                }
                self.outcome()
            }
            other => Some(Incoming::Message(other)),
        }
    }

    fn answer(&mut self, challenge: &str, control: &mpsc::Sender<Message>) {
        (self.proven, self.refusal) = (false, String::new());
        self.waiting.clear();
        let now_ms = self.world.now_ms().saturating_add_signed(self.clock_offset_ms);
        for keys in self.keys.iter() {
            let tags = Tags::from_lists([["relay", self.url.as_str()], ["challenge", challenge]]);
            let proof = keys.sign(Kind::CLIENT_AUTH, now_ms / 1000, tags, String::new());
            let json = std::str::from_utf8(&proof.canonical().json).expect("canonical JSON is text");
            // A relay that sends challenges faster than we can answer them gets none for some.
            if control.try_send(Message::text(message::auth_answer(json))).is_ok() {
                self.waiting.push(proof.id);
            }
        }
    }

    fn outcome(&mut self) -> Option<Incoming> {
        if !self.waiting.is_empty() {
            return None;
        }
        let refusal = std::mem::take(&mut self.refusal);
        Some(if self.proven { Incoming::Authenticated } else { Incoming::AuthRefused(refusal) })
    }
}
