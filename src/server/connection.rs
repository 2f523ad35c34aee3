//! One WebSocket connection: a task that reads, lets [`Peer`] decide, and writes.
//!
//! What is produced is written before more is produced: while the socket does not take bytes, the connection reads no
//! messages and takes nothing from its outbox, so a slow reader costs one batch and its bounded outbox.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep};
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use super::frames::Frames;
use super::http::{Client, Shaken};
use super::idle::{Idle, Patience};
use super::negotiations::Call;
use super::peer::{Action, Peer};
use super::rate::Meter;
use super::rate::meter::{Conduct, PAUSE};
use super::reader::{Broken, Received};
use super::wire::Wire;
use crate::auth::{Authority, Challenge, Session};
use crate::protocol::Event;
use crate::protocol::message::{self, ClientMessage};
use crate::relay::Relay;
use crate::relay::outbox::{Outbox, Outgoing, Serial, Taken};
use crate::relay::query::Job;
use crate::relay::writer::Submission;

/// Bytes of messages that are framed before they are written.
const WRITE_BATCH_BYTES: usize = 64 * 1024;

/// Events that are checked before another connection has its turn. A signature takes 25 µs and more on a small machine:
/// whoever sends hundreds of events at once must not make the questions of others wait for all of them.
const CHECKS_A_TURN: u32 = 2;

/// Time for the client to take the last frames and end its side.
const LINGER: Duration = Duration::from_secs(1);

/// A connection after the handshake.
pub struct Connection {
    relay: Arc<Relay>,
    outbox: Arc<Outbox>,
    client: Client,
    wire: Wire,
    peer: Peer,
    meter: Meter,
    /// Until when the socket is not read, after too much was asked for.
    paused_until: Option<Instant>,
    idle: Idle,
    timer: Pin<Box<Sleep>>,
    /// A checked event for which the writer has no room yet.
    submission: Option<Box<Submission>>,
    /// Rests of queries whose pages are being written.
    resting: Vec<Job>,
    stopping: bool,
    /// Whether the socket did not take all that was to be written.
    blocked: bool,
    /// Which side is looked at first; they take turns.
    socket_first: bool,
    /// Events that were checked in this turn.
    checked: u32,
}

/// What happened.
enum Step {
    /// The client said something, or the socket came to an end.
    Received(Option<Result<Received, Broken>>),
    /// Something is to be sent.
    Taken(Taken, Vec<Outgoing>),
    /// Somebody has been silent for long.
    Timer,
    /// The socket cannot be written.
    Broken(io::Error),
}

/// Why a connection ends.
#[derive(Debug)]
enum End {
    /// The client closed, or is gone.
    ByClient,
    /// The relay closes it.
    ByRelay(CloseCode, &'static str),
}

impl Connection {
    /// A connection on a socket that has shaken hands.
    pub fn new(relay: Arc<Relay>, outbox: Arc<Outbox>, meter: Meter, shaken: Shaken) -> Connection {
        let Shaken { socket, read, deflate, mut client } = shaken;
        let config = relay.config();
        let limits = &config.limits;
        let idle = Idle::new(limits.idle_ping(), limits.idle_timeout(), Instant::now());
        let timer = Box::pin(tokio::time::sleep_until(idle.next()));
        let session = Session::new(Challenge::new(secp256k1::rand::random()), client.reached.take());
        let session = if client.is_operator { session.of_operator() } else { session };
        let peer = Peer::new(config.clone(), relay.gate().clone(), session);
        let mut wire = Wire::new(socket, &read, limits.frame_bytes_max, deflate);
        wire.frames.text(&peer.greeting());
        Connection {
            relay,
            outbox,
            client,
            wire,
            peer,
            meter,
            paused_until: None,
            idle,
            timer,
            submission: None,
            resting: Vec::new(),
            stopping: false,
            blocked: false,
            socket_first: true,
            checked: 0,
        }
    }

    /// Serves the client until one side ends it.
    pub async fn run(&mut self) {
        let end = loop {
            let step = std::future::poll_fn(|cx| self.poll_step(cx)).await;
            if let Err(end) = self.step(step) {
                break end;
            }
            if self.checked >= CHECKS_A_TURN {
                self.checked = 0;
                tokio::task::yield_now().await;
            }
            tokio::task::consume_budget().await;
        };
        self.end(end).await;
    }

    async fn end(&mut self, end: End) {
        tracing::debug!(connection = self.outbox.connection, ?end, "connection ends");
        self.release();
        if let End::ByRelay(code, reason) = end {
            self.frames().close(code, reason);
        }
        // Whether the client hears the end is its own matter.
        let _ = tokio::time::timeout(LINGER, self.wire.finish()).await;
    }

    /// Ends everything that the relay does for this connection.
    fn release(&mut self) {
        self.outbox.close();
        self.peer.negotiations().close_all();
        self.peer.serials().for_each(|serial| self.relay.unsubscribe(&self.outbox, serial));
    }

    fn frames(&mut self) -> &mut Frames {
        &mut self.wire.frames
    }

    fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<Step> {
        let writable = match self.poll_drain(cx) {
            Poll::Ready(Ok(())) => true,
            Poll::Ready(Err(error)) => return Poll::Ready(Step::Broken(error)),
            Poll::Pending => false,
        };
        if writable {
            self.resume_queries();
        }
        self.socket_first = !self.socket_first;
        for socket in [self.socket_first, !self.socket_first] {
            let step = if socket { self.poll_socket(cx, writable) } else { self.poll_outbox(cx, writable) };
            if step.is_ready() {
                return step;
            }
        }
        self.timer.as_mut().poll(cx).map(|()| Step::Timer)
    }

    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let wire = &mut self.wire;
        let waiting = wire.frames.unwritten().len();
        let drained = wire.poll_drain(cx);
        self.relay.counters().sent_bytes.add(waiting - wire.frames.unwritten().len());
        // A slow reader that goes on taking is alive. What the system merely buffers says nothing about the client.
        if self.blocked && wire.frames.unwritten().len() < waiting {
            self.idle.seen(Instant::now());
        }
        self.blocked = drained.is_pending();
        drained
    }

    fn poll_socket(&mut self, cx: &mut Context<'_>, writable: bool) -> Poll<Step> {
        let submitted = self.relay.poll_submit(cx, &mut self.submission).is_ready();
        if writable && submitted && !self.stopping && self.paused_until.is_none() && self.peer.wants_input() {
            return self.wire.poll_receive(cx).map(Step::Received);
        }
        Poll::Pending
    }

    fn poll_outbox(&mut self, cx: &mut Context<'_>, writable: bool) -> Poll<Step> {
        let mut batch = Vec::new();
        let bytes_max = if writable { WRITE_BATCH_BYTES } else { 0 };
        self.outbox.poll_take(cx, bytes_max, &mut batch).map(|taken| Step::Taken(taken, batch))
    }

    fn resume_queries(&mut self) {
        for job in self.resting.drain(..) {
            self.peer.resumed();
            self.relay.resume(job);
        }
    }

    fn step(&mut self, step: Step) -> Result<(), End> {
        self.frames().begin_batch();
        match step {
            Step::Received(received) => self.receive(received)?,
            Step::Taken(Taken::Some, batch) => batch.into_iter().try_for_each(|message| self.send(message))?,
            Step::Taken(Taken::Overflow, _) => return Err(self.too_slow()),
            Step::Taken(Taken::Stop, _) => self.stopping = true,
            Step::Taken(Taken::Expelled, _) => return Err(End::ByRelay(CloseCode::Policy, "blocked")),
            Step::Timer => {
                self.paused_until = None;
                self.check_idle()?;
            }
            Step::Broken(error) => {
                tracing::debug!(connection = self.outbox.connection, %error, "writing failed");
                return Err(End::ByClient);
            }
        }
        while let Some(action) = self.peer.take_held() {
            self.act(action)?;
        }
        if self.stopping && self.peer.is_settled() {
            return Err(End::ByRelay(CloseCode::Away, "the relay is stopping"));
        }
        Ok(())
    }

    fn receive(&mut self, received: Option<Result<Received, Broken>>) -> Result<(), End> {
        self.idle.seen(Instant::now());
        match received {
            Some(Ok(Received::Text(text))) => {
                let counters = self.relay.counters();
                counters.messages.add(1);
                counters.message_bytes.add(text.len());
                let queried = self.outbox.take_query_time();
                let (message, conduct) =
                    self.meter.charge(ClientMessage::parse(&text), text.len(), queried, Instant::now());
                if conduct == Conduct::Banned {
                    return self.go_by(conduct);
                }
                let action = self.peer.handle(message);
                self.act(action)?;
                self.go_by(conduct)?;
            }
            Some(Ok(Received::Binary)) => {
                self.go_by(self.meter.control(Instant::now()))?;
                self.frames().text(&message::notice("invalid: this relay reads text messages only"));
            }
            Some(Ok(Received::Ping(payload))) => {
                self.go_by(self.meter.control(Instant::now()))?;
                self.frames().pong(&payload);
            }
            Some(Ok(Received::Pong)) => self.go_by(self.meter.control(Instant::now()))?,
            Some(Ok(Received::Close(code))) => {
                self.frames().close_in_return(code);
                return Err(End::ByClient);
            }
            Some(Err(broken)) => {
                self.meter.broken(Instant::now());
                return Err(end_of(broken));
            }
            None => return Err(End::ByClient),
        }
        Ok(())
    }

    /// Goes on as the limits of the client's address say.
    fn go_by(&mut self, conduct: Conduct) -> Result<(), End> {
        match conduct {
            Conduct::Fine => {}
            Conduct::Pause => {
                let until = Instant::now() + PAUSE;
                self.paused_until = Some(until);
                let wake = until.min(self.idle.next());
                self.timer.as_mut().reset(wake);
            }
            Conduct::Banned => {
                self.frames().text(&message::notice("blocked: too much garbage from your address; come back later"));
                return Err(End::ByRelay(CloseCode::Policy, "too much garbage"));
            }
        }
        Ok(())
    }

    fn act(&mut self, action: Action) -> Result<(), End> {
        match action {
            Action::Nothing => {}
            Action::Answer { text, ended } => {
                self.frames().text(&text);
                self.unsubscribe(ended);
            }
            Action::Publish(event) => return self.publish(*event),
            Action::Authenticate(event) => self.authenticate(*event),
            Action::Subscribe { serial, filters, replaced } => {
                self.unsubscribe(replaced);
                self.relay.subscribe(&self.outbox, serial, filters, self.peer.visible());
            }
            Action::Count { serial, filters } => self.relay.count(&self.outbox, serial, filters, self.peer.visible()),
            Action::Unsubscribe(serial) => self.unsubscribe(Some(serial)),
            Action::Negotiate(Call::Open(opening)) => {
                self.relay.negotiate(&self.outbox, opening, self.peer.visible());
            }
            Action::Negotiate(Call::GoOn(negotiation)) => self.relay.go_on(negotiation),
            Action::Negotiate(Call::Refuse(text)) => self.frames().text(&text),
        }
        Ok(())
    }

    fn unsubscribe(&self, serial: Option<Serial>) {
        if let Some(serial) = serial {
            self.relay.unsubscribe(&self.outbox, serial);
        }
    }

    fn authenticate(&mut self, event: Event) {
        let own = Authority::of_url(&self.relay.config().service_url);
        let (answer, sees_more) = self.peer.authenticate(event, own.as_ref(), self.relay.now());
        self.frames().text(&answer);
        if sees_more {
            self.relay.widen(&self.outbox, self.peer.serials(), &self.peer.visible());
            self.meter.prove(&self.peer.sender(self.client.ip).keys);
        }
    }

    fn publish(&mut self, event: Event) -> Result<(), End> {
        let id = event.id;
        let sender = self.peer.sender(self.client.ip);
        self.checked += 1;
        match self.relay.check(event, &sender) {
            Ok(event) => {
                self.submission = Some(Box::new(Submission { event, reply: self.outbox.clone(), sender }));
            }
            Err(rejection) => {
                if !self.relay.look_again(&self.outbox, id, &rejection) {
                    let (accepted, text) = (rejection.is_accepted(), rejection.to_string());
                    self.relay.counters().answered(accepted, &text);
                    self.frames().text(&message::ok(&id, accepted, &text));
                    self.peer.answered();
                }
                return self.go_by(self.meter.rejected(&rejection, Instant::now()));
            }
        }
        Ok(())
    }

    fn send(&mut self, message: Outgoing) -> Result<(), End> {
        let frames = &mut self.wire.frames;
        match message {
            Outgoing::Answer(text) => {
                frames.text(&text);
                self.peer.answered();
            }
            Outgoing::Live { serial, event } => {
                if self.peer.live(serial, event, frames).is_err() {
                    return Err(self.too_slow());
                }
            }
            Outgoing::Negotiated(negotiated) => {
                self.peer.negotiated(*negotiated, Instant::now(), frames);
                self.set_timer();
            }
            Outgoing::Page(page) => {
                let after = self.peer.page(*page, frames);
                self.resting.extend(after.rest);
                self.unsubscribe(after.ended);
            }
        }
        Ok(())
    }

    fn too_slow(&mut self) -> End {
        self.relay.counters().too_slow.add(1);
        self.frames().text(&message::notice("error: too slow for the events of your subscriptions"));
        End::ByRelay(CloseCode::Policy, "too slow")
    }

    fn check_idle(&mut self) -> Result<(), End> {
        match self.idle.check(Instant::now()) {
            Patience::Wait => {}
            Patience::Ping => self.frames().ping(),
            Patience::End => return Err(End::ByRelay(CloseCode::Policy, "silent for too long")),
        }
        self.peer.negotiations().expire(Instant::now(), &mut self.wire.frames);
        self.set_timer();
        Ok(())
    }

    fn set_timer(&mut self) {
        let next = [Some(self.idle.next()), self.peer.negotiations().next_deadline()].into_iter().flatten().min();
        if let Some(next) = next {
            self.timer.as_mut().reset(next);
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.release();
    }
}

/// What the relay says to a client whose frames cannot be gone on after.
fn end_of(broken: Broken) -> End {
    match broken {
        Broken::TooLarge => End::ByRelay(CloseCode::Size, "larger than a message may be"),
        Broken::NotText => End::ByRelay(CloseCode::Invalid, "not UTF-8"),
        Broken::Protocol(_) => End::ByRelay(CloseCode::Protocol, "not the WebSocket protocol"),
    }
}
