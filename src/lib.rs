//! sledge: a Nostr relay and a sync engine in one small binary. This page is its architecture.
//!
//! Events live in one append-only file, the event log. sled indexes it and can be thrown away at any time. A WebSocket
//! server, a command line and a sync client stand on top. A message travels down once and answers up once.
//!
//! # Rooms
//!
//! Imports point down only; a test (`tests/it/layering.rs`) fails on one that points up.
//!
//! ```text
//!  4   main → cli → error
//!              │
//!  3      server     client      sockets: accept, HTTP, WebSocket, one task a connection; the client's links to relays
//!            │         │
//!  2       relay       │         the one write path, live fan-out, queries in turns; no sockets, no HTTP
//!            │         │
//!  1     store auth sync         store alone knows bytes on disk; auth and sync are pure
//!              │
//!  0   protocol   config         protocol is pure; config is plain data, checked once
//! ```
//!
//! - [`protocol`]: events, filters, messages, and the verdicts between events. No clock, no disk, no task: what time it
//!   is comes in as an argument. [`protocol::Verified`] is the only thing a store accepts, and only
//!   [`protocol::verify`] makes one.
//! - [`store`]: the [`store::Store`] trait and the embedded store behind it: [`store::log`] (bytes of the event log),
//!   [`store::record`] (bytes of one record), [`store::hot`] (records that many
//!   ask for, in memory), [`store::schema`] (every key of the index), [`store::index`] (sled or fjall, the
//!   write buffer in front of it, the filter on ids), [`store::plan`], [`store::estimate`] and [`store::merge`] (from a filter to one stream,
//!   newest first). [`store::backup`] copies the log, [`store::repair`] mends it. [`store::memory`] is the oracle: a
//!   vector and the reference meaning.
//! - [`auth`]: who is at the other end (NIP-42), and which questions need to know: [`auth::Gate`]. What a reader may see of
//!   what is found is [`protocol::visibility`], one predicate for stored queries, COUNT and live events alike.
//! - [`sync`]: chats, settings and training data as collections that merge, the hybrid logical clock, what an outbox owes
//!   and what an answer settles, and reconciliation (NIP-77) from both sides. Its page shows every event shape, for apps in other languages.
//! - [`relay`]: ingest stages, the writer thread, the live index, the query threads, the sweeper for expired events,
//!   upkeep (compaction by itself). [`relay::policy`] says who may write and holds what admins have decided,
//!   [`relay::plugin`] asks a program of the operator's.
//!   [`relay::negotiation`] answers reconciliations on the query threads; [`relay::side`] is this relay's end of a stream
//!   with another one.
//! - [`sync`]: the engine's rules, pure. [`sync::reconcile`] is NIP-77 for both sides, over any [`sync::reconcile::Set`]: a
//!   list, or the sums that the embedded store keeps for everything, an author, a kind or a tag (`store::sums`), changed in
//!   one step with each write.
//! - [`client`]: links to other relays. [`client::stream`] makes this relay and another one equal, [`client::mirrors`] keeps
//!   them so.
//! - [`server`]: one port for WebSocket, NIP-11 and a landing page; [`server::rate`] (what an address may ask for a second);
//!   a control socket for the command line, metrics on an address of their own. [`relay::counters`] and [`relay::querylog`]
//!   hold what is counted.
//! - [`sync`]: chats, settings and training data as pure collections, the hybrid logical clock, the outbox's rules and
//!   both sides of a reconciliation.
//! - [`client`]: a user's side: [`client::Client`], a profile on disk (outbox, local copy), a link to each relay. Never the
//!   server: a relay on this machine is reached like any other.
//! - [`server::reader`], [`server::frames`] and [`server::deflate`] are the WebSocket protocol on both ways: a silent
//!   connection holds no buffer, and no connection holds a compressor.
//! - [`cli`]: one file a command. [`config`]: `sync.toml`, and [`config::Live`], the settings in force until a reload. [`error`]: what a caller of the crate can meet.
//!
//! # The walk of an EVENT
//!
//! `server::connection` takes one frame → `protocol::message` parses it → `server::peer` decides what it asks for →
//! `relay::ingest` runs the stages, cheapest first: limits, policy, id, already stored, signature (25 µs, in the
//! connection's own task) → `relay::plugin`, where there is one → the bounded queue of `relay::writer` (when it is full, the socket is not read) → the writer
//! thread gathers what waits into a batch → [`store::Store::apply`]: judged one after the other, appended to the log,
//! **fdatasync**, visible in the index's write buffer → only now the `OK`s go out and `relay::fanout` gets the events.
//! An `OK true` therefore means that the event survives a power cut.
//!
//! # The walk of a REQ
//!
//! `server::peer` checks caps and asks [`auth::Gate`] whether authentication is missing → `relay::fanout` registers the subscription and says up to which point the store has
//! everything that will not come live → `relay::query` reads up to that point what the client may see
//! ([`protocol::Visibility`]), page by page, a time slice at a time;
//! the connection hands the rest of the query back when it has written a page → EOSE with NIP-67's hint → live events
//! that were held meanwhile, then each as it is stored. Nothing comes twice and nothing is missed, without comparing
//! ids: the point divides stored from live.
//!
//! # The walk of a reconciliation
//!
//! `NEG-OPEN` passes the gate like a REQ → `relay::query`'s threads gather what matches and may be seen, or find the
//! store's sums, which hold public events only, or for an author who asks for the own ones all of those; what a reader
//! sees besides is listed → the machine answers range by range, a time slice at a time → the session waits at its connection for the next message, and goes after a silence.
//! The other way round `client::stream` begins: deletions are compared first, missing events are fetched by id, offered
//! ones go out oldest first, until a comparison moves nothing.
//!
//! # The walk of an offline write
//!
//! An app's command → [`client::app`] asks [`sync`] for a draft, dated by the hybrid logical clock → the draft and the
//! relays that it is owed to are one record of [`client::outbox`]'s journal, **fdatasync** → the app has its answer, and
//! sees the write. A link comes up ([`client::links`]) → the relay's clock corrects ours → drafts are encrypted and signed,
//! the events are durable in the journal and put into the local copy, and only then sent, oldest first, a window at a
//! time: what stands for itself at once, what merges (heads of chats, settings) when [`client::catchup`] has fetched all
//! that the relay has, deletions first → each relay's answer settles its own debt → what this relay gave and the user's
//! others may lack is carried to them.
//!
//! # The walk of a decision
//!
//! A call of the management API (NIP-86), from `server::admin`, the control socket or `sledge admin` → work for the
//! writer's thread ([`relay::policy::admin`]), one step between two batches → changed on a copy, saved as a blob of the
//! store ([`store::state`]), in force for every door → what is stored follows, in portions, and only then the answer goes
//! out. The writer looks once more at each event that has waited meanwhile.
//!
//! # Several processes, one database
//!
//! With the feature `postgres` the store may be a database that several relays share ([`config::postgres`] has the
//! settings, `store::postgres` the store). Whoever writes holds a row lock to the end of the transaction, so events
//! become visible in the order of their positions. What others stored comes with the next batch
//! ([`store::Applied::others`]) or, when a notification wakes the writer, by itself ([`store::Store::news`]), and goes
//! through the same fan-out: the point that divides stored from live holds for all of them. Retention is the same keeper
//! (`store::quota`) on other ground, one process at a time. When the server goes away, [`config::postgres::hosts`] says
//! where else the primary may be.
//!
//! # What a crash leaves
//!
//! A log whose last write may be torn: it is cut off at the next start. An index that reaches up to some offset of the
//! log: the rest is replayed. Bytes that a deletion promised to erase: the removal in the log names them, and they are
//! erased at the next start. A ban whose events are not all removed: it is in force, and the next start goes on. A
//! generation that was being written by compaction: `CURRENT` still names the old one. An
//! index that was being rebuilt: the rebuilding goes on where the last run of it ended, and events are counted again. A
//! request to vanish of a large author that was broken off half-way: not stored, so it is sent again and does the rest.
//! In a client's profile: debts whose answer was not written down, so that an event is sent again and answered with
//! `duplicate:`; events that are in the journal and not yet in the local copy, where they are put at the next start.
//!
//! # Threads
//!
//! tokio's workers (sockets, parsing, signatures), one writer, a few query threads, one index merger; where they are set up, one that
//! reads the web of trust and some for the plugin. Every queue, page,
//! frame and retry between them has a named bound in `sync.toml` or beside the code. Nothing waits on a slow reader but
//! that reader.

pub mod auth;
pub mod cli;
pub mod client;
pub mod config;
pub mod error;
pub mod protocol;
pub mod relay;
pub mod server;
pub mod store;
pub mod sync;
