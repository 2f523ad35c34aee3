//! What an app holds: [`Client`], and through it chats, settings, training data and the outbox.
//!
//! Reading answers from this device at once. Writing returns when the write is durable here; relays get it when they can
//! be reached. Calls that are not async block on the disk, shortly: an async app makes them on a thread that may wait.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::{broadcast, watch};

use super::clock::World;
use super::keys::Keys;
use super::link::LinkOptions;
use super::links::{self, Links, Visit};
use super::local::LocalSettings;
use super::outbox::OutboxError;
use super::profile::{Profile, ProfileOptions};
use super::status::Status;
use crate::protocol::{Event, EventId, Filter, PublicKey};
use crate::store::StoreError;
use crate::sync::chat::{ChatError, ChatKey, HeadView, MessageView};
use crate::sync::draft::{Op, Plain};
use crate::sync::import::{OldChat, Tally};
use crate::sync::outbox::{RelayUrl, Seq};
use crate::sync::settings::{self, Conflict, StaysHere};
use crate::sync::training::{self, Consent, Contribution, NotContributed, Quality, Terms};

/// Why the client did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The outbox did not take it.
    #[error(transparent)]
    Outbox(#[from] OutboxError),
    /// The disk refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It makes no sense for this chat.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// The text is not given away.
    #[error(transparent)]
    NotContributed(#[from] NotContributed),
    /// A secret setting was to be written without saying that it may leave the device.
    #[error(transparent)]
    StaysHere(#[from] StaysHere),
    /// What was named is not there, or not such that this can be done with it.
    #[error("{0}")]
    NotThere(&'static str),
}

/// A user's client on one device.
pub struct Client {
    profile: Arc<Profile>,
    options: LinkOptions,
    links: Option<Links>,
}

impl Client {
    /// Opens a profile, offline.
    ///
    /// # Errors
    /// As [`Profile::open`].
    pub fn open(
        profile: &ProfileOptions,
        keys: Keys,
        options: LinkOptions,
        world: World,
    ) -> Result<Client, StoreError> {
        Ok(Client { profile: Arc::new(Profile::open(profile, keys, world)?), options, links: None })
    }

    /// Keeps links to all relays from now on. Must be called on a tokio runtime.
    pub fn go_online(&mut self) {
        if self.links.is_none() {
            self.links = Some(Links::start(Arc::clone(&self.profile), self.options));
        }
    }

    /// Ends all links.
    pub async fn go_offline(&mut self) {
        if let Some(links) = self.links.take() {
            links.stop().await;
        }
    }

    /// Visits every relay once instead: catches up, sends what is owed, and goes. For programs that run shortly.
    pub async fn visit_relays(&self, time_max: Duration) -> BTreeMap<RelayUrl, Visit> {
        links::visit_all(&self.profile, self.options, time_max).await
    }

    /// Who the user is.
    pub fn pubkey(&self) -> PublicKey {
        self.profile.keys().pubkey()
    }

    /// The profile beneath.
    pub fn profile(&self) -> &Arc<Profile> {
        &self.profile
    }

    /// How much waits, how the links are, what was refused: at present and from now on.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.profile.status()
    }

    /// The chats.
    pub fn chats(&self) -> Chats<'_> {
        Chats(&self.profile)
    }

    /// The settings.
    pub fn settings(&self) -> Settings<'_> {
        Settings(&self.profile)
    }

    /// Training data.
    pub fn training(&self) -> Training<'_> {
        Training(&self.profile)
    }

    /// Publishes an event of any kind, in the clear; it is dated and signed when a relay first takes it.
    ///
    /// # Errors
    /// [`OutboxError`]; nothing was taken then.
    pub fn publish(&self, kind: u16, tags: Vec<Vec<String>>, content: &str) -> Result<Seq, OutboxError> {
        let op = Op::Plain(Plain { kind, tags, content: content.to_owned() });
        Ok(self.profile.write(vec![op])?[0])
    }

    /// The events of this device that a filter matches, newest first.
    ///
    /// # Errors
    /// When the cache cannot be read.
    pub fn query(&self, filters: &[Filter]) -> Result<Vec<Event>, StoreError> {
        self.profile.cache().query(filters, self.profile.now_secs())
    }

    /// The events of this device that a filter matches, newest first, and then those that come. Some of the first may
    /// come again.
    ///
    /// # Errors
    /// When the cache cannot be read.
    pub fn subscribe(&self, filters: Vec<Filter>) -> Result<(Vec<Event>, Subscription), StoreError> {
        // Listening begins before reading, so that nothing is missed.
        let news = self.profile.news();
        let stored = self.query(&filters)?;
        Ok((stored, Subscription { filters, news }))
    }

    /// Closes the profile.
    ///
    /// # Errors
    /// When the last writes fail. Nothing that was taken is lost even then.
    pub async fn close(mut self, time_max: Duration) -> Result<(), StoreError> {
        self.go_offline().await;
        let profile = self.profile;
        let closing = tokio::task::spawn_blocking(move || profile.close(Instant::now() + time_max));
        closing.await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
    }
}

/// Events as they come.
#[derive(Debug)]
pub struct Subscription {
    filters: Vec<Filter>,
    news: broadcast::Receiver<Arc<Event>>,
}

impl Subscription {
    /// The next event; `None` when some were missed by a reader that is too slow, who then asks the cache again.
    pub async fn next(&mut self) -> Option<Arc<Event>> {
        loop {
            match self.news.recv().await {
                Ok(event) if self.filters.iter().any(|filter| filter.matches(&*event)) => return Some(event),
                Ok(_) => {}
                Err(_) => return None,
            }
        }
    }
}

/// A user's chats.
#[derive(Clone, Copy)]
pub struct Chats<'c>(&'c Profile);

impl Chats<'_> {
    /// An own chat by its id.
    pub fn own(&self, id: &str) -> ChatKey {
        ChatKey { owner: self.0.keys().pubkey(), id: id.to_owned() }
    }

    /// Begins a chat; its key.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn create(&self, title: &str) -> Result<ChatKey, ClientError> {
        let id = self.0.world().uuid();
        let op = self.0.see(|all, drafts| all.chat_view(drafts.iter().copied()).set_title(&id, title))?;
        self.0.write(vec![op])?;
        Ok(self.own(&id))
    }

    /// Changes a field of an own chat's head: `title`, `archived`, `share`, `trainingOptIn` or the app's own; null
    /// removes it.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn set(&self, chat: &ChatKey, field: &str, value: Value) -> Result<(), ClientError> {
        if chat.owner != self.0.keys().pubkey() {
            return Err(ClientError::NotThere("only its owner changes a chat"));
        }
        let op = self.0.see(|all, drafts| all.chat_view(drafts.iter().copied()).set_field(&chat.id, field, value))?;
        self.0.write(vec![op])?;
        Ok(())
    }

    /// All chats.
    ///
    /// # Errors
    /// When the cache cannot be read.
    pub fn list(&self) -> Result<Vec<HeadView>, ClientError> {
        Ok(self.0.see(|all, drafts| all.chat_view(drafts.iter().copied()).list())?)
    }

    /// A chat's messages in their order.
    ///
    /// # Errors
    /// When the cache cannot be read.
    pub fn messages(&self, chat: &ChatKey) -> Result<Vec<MessageView>, ClientError> {
        Ok(self.0.see(|all, drafts| all.chat_view(drafts.iter().copied()).messages(chat))?)
    }

    /// Writes a message at the end of a chat; its id.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn send(&self, chat: &ChatKey, role: &str, text: &str, meta: Value) -> Result<String, ClientError> {
        let id = self.0.world().uuid();
        let op =
            self.0.see(|all, drafts| all.chat_view(drafts.iter().copied()).send(chat, &id, role, text, meta))??;
        self.0.write(vec![op])?;
        Ok(id)
    }

    /// Gives an own message another text.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn edit(&self, chat: &ChatKey, message: &str, text: &str) -> Result<(), ClientError> {
        let op = self.0.see(|all, drafts| all.chat_view(drafts.iter().copied()).edit(chat, message, text))??;
        self.0.write(vec![op])?;
        Ok(())
    }

    /// Deletes an own message.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn delete(&self, chat: &ChatKey, message: &str) -> Result<(), ClientError> {
        let op = self.0.see(|all, drafts| all.chat_view(drafts.iter().copied()).delete(chat, message))??;
        self.0.write(vec![op])?;
        Ok(())
    }

    /// Takes in chats of the older shape, all or none; what became of each message. See [`Profile::import`].
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn import(&self, old: &[OldChat]) -> Result<Tally, ClientError> {
        Ok(self.0.import(old)?)
    }

    /// Deletes an own chat and the own messages in it.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn delete_chat(&self, chat: &ChatKey) -> Result<(), ClientError> {
        if chat.owner != self.0.keys().pubkey() {
            return Err(ClientError::NotThere("only its owner deletes a chat"));
        }
        let ops = self.0.see(|all, drafts| all.chat_view(drafts.iter().copied()).delete_chat(&chat.id))?;
        self.0.write(ops)?;
        Ok(())
    }
}

/// A user's settings.
#[derive(Clone, Copy)]
pub struct Settings<'c>(&'c Profile);

impl Settings<'_> {
    /// Writes a setting; null removes it. One whose name starts with `device.` stays on this device, and so does one
    /// under `secret.` unless `secrets_may_leave`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn set(&self, name: &str, value: Value, secrets_may_leave: bool) -> Result<(), ClientError> {
        match settings::Settings::set(name, &value, secrets_may_leave) {
            Ok(ops) => {
                self.0.write(ops.into())?;
            }
            Err(StaysHere::Device | StaysHere::Secret) => LocalSettings::open(self.0.dir())?.set(name, value)?,
        }
        Ok(())
    }

    /// A setting; `None` if there is none.
    ///
    /// # Errors
    /// When the disk cannot be read.
    pub fn get(&self, name: &str) -> Result<Option<Value>, ClientError> {
        Ok(self.all()?.remove(name))
    }

    /// All settings, those of this device included.
    ///
    /// # Errors
    /// When the disk cannot be read.
    pub fn all(&self) -> Result<BTreeMap<String, Value>, ClientError> {
        let fields = self.0.see(|all, drafts| all.settings.view(drafts.iter().copied()))?;
        let synced = fields.iter().filter(|(_, field)| !field.0.is_null());
        let mut settings: BTreeMap<String, Value> =
            synced.map(|(name, field)| (name.to_owned(), field.0.clone())).collect();
        settings.extend(LocalSettings::open(self.0.dir())?.into_all());
        Ok(settings)
    }

    /// The settings that devices wrote without knowing of each other, until a merge is published: the later one counts.
    ///
    /// # Errors
    /// When the cache cannot be read.
    pub fn conflicts(&self) -> Result<Vec<Conflict>, ClientError> {
        Ok(self.0.see(|all, _| all.settings.conflicts())?)
    }
}

/// Training data: the user's own contributions, and those that the user may read as a curator.
#[derive(Clone, Copy)]
pub struct Training<'c>(&'c Profile);

/// A contribution and what became of it.
#[derive(Clone, Debug)]
pub struct ContributionStatus {
    /// The contribution.
    pub contribution: Contribution,
    /// The highest status that an operator gave it.
    pub status: training::Status,
    /// What others think of it, as far as this device knows.
    pub ratings: BTreeMap<PublicKey, Quality>,
}

impl Training<'_> {
    /// Gives a text away, with consent to this very text.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn contribute(&self, text: &str, terms: Terms, consent: Consent) -> Result<Seq, ClientError> {
        let me = self.0.keys().pubkey();
        let op =
            self.0.see(|all, drafts| all.training.contribute(&me, text, terms, consent, drafts.iter().copied()))??;
        Ok(self.0.write(vec![op])?[0])
    }

    /// Gives a message of a chat away that is opened for it (`trainingOptIn`), with consent to this very text.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn contribute_message(
        &self,
        chat: &ChatKey,
        message: &str,
        terms: Terms,
        consent: Consent,
    ) -> Result<Seq, ClientError> {
        let op = self.0.see(|all, drafts| {
            let view = all.chat_view(drafts.iter().copied());
            let messages = view.messages(chat);
            let found = messages.iter().find(|shown| shown.message.id == message);
            let found = found.ok_or(ClientError::Chat(ChatError::NoMessage))?;
            let head = view.head(chat);
            let given = all.training.contribute_message(&head, &found.message, terms, consent, drafts.iter().copied());
            given.map_err(ClientError::from)
        })??;
        Ok(self.0.write(vec![op])?[0])
    }

    /// Rates somebody else's contribution.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn rate(&self, target: &EventId, quality: Quality) -> Result<Seq, ClientError> {
        let me = self.0.keys().pubkey();
        let op = self.0.see(|all, _| all.training.rate(&me, target, quality))?;
        let op = op.ok_or(ClientError::NotThere("this is no contribution of somebody else's that is known here"))?;
        Ok(self.0.write(vec![op])?[0])
    }

    /// Withdraws an own contribution.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn withdraw(&self, target: &EventId) -> Result<Seq, ClientError> {
        let me = self.0.keys().pubkey();
        let op = self.0.see(|all, _| all.training.withdraw(&me, target))?;
        let op = op.ok_or(ClientError::NotThere("this is no contribution of yours that is known here"))?;
        Ok(self.0.write(vec![op])?[0])
    }

    /// All contributions that are known here, newest first, with what became of them by the word of `operators`.
    ///
    /// # Errors
    /// When the cache cannot be read.
    pub fn status(&self, operators: &[PublicKey]) -> Result<Vec<ContributionStatus>, ClientError> {
        let mut all = self.0.see(|all, _| {
            let status = |given: &Contribution| ContributionStatus {
                status: operators.iter().map(|key| all.training.status(key, &given.id)).max().unwrap_or_default(),
                ratings: all.training.ratings(&given.id),
                contribution: given.clone(),
            };
            all.training.contributions().map(status).collect::<Vec<_>>()
        })?;
        all.sort_by_key(|one| std::cmp::Reverse((one.contribution.created_at, one.contribution.id)));
        Ok(all)
    }
}
