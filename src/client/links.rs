//! The links of a profile: one to each relay that it has or owes something, for as long as an app runs, or once.
//!
//! In: an open profile. Out: its status, and a profile that becomes equal to its relays whenever they can be reached.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use super::dial;
use super::keys::Keys;
use super::link::{LinkError, LinkOptions, Redial};
use super::profile::Profile;
use super::session::{Ended, Session, Stay};
use super::status::{LinkState, Status};
use crate::sync::outbox::RelayUrl;

/// Links at the same time. Relay lists of strangers decide over some of them.
const LINKS_MAX: usize = 64;
/// How often all relays are visited in one go: what one gave, the others get in the next round.
const ROUNDS_MAX: usize = 3;

/// Links that are kept up until they are stopped.
#[derive(Debug)]
pub struct Links {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Links {
    /// Keeps a link to every relay that is named or owed something. Must be called on a tokio runtime.
    pub fn start(profile: Arc<Profile>, options: LinkOptions) -> Links {
        let (stop, stopping) = watch::channel(false);
        let task = tokio::spawn(keep_all(profile, options, stopping));
        Links { stop, task }
    }

    /// Ends all links. What is on its way is owed as before.
    pub async fn stop(self) {
        let _ = self.stop.send(true);
        let _ = self.task.await;
    }
}

async fn keep_all(profile: Arc<Profile>, options: LinkOptions, mut stopping: watch::Receiver<bool>) {
    let mut owed = profile.owed();
    let mut links = JoinSet::new();
    let mut kept = BTreeSet::new();
    loop {
        owed.mark_unchanged();
        for relay in relays(&profile).into_iter().filter(|relay| kept.insert(relay.clone())).collect::<Vec<_>>() {
            links.spawn(keep_one(Arc::clone(&profile), relay, options, stopping.clone()));
        }
        tokio::select! {
            _ = owed.changed() => {}
            _ = stopping.wait_for(|stop| *stop) => break,
        }
    }
    while links.join_next().await.is_some() {}
}

/// The relays of the settings first, then those that are owed something.
fn relays(profile: &Profile) -> Vec<RelayUrl> {
    let named = profile.routing().named();
    let owed = profile.owed_relays().into_iter().filter(|relay| !named.contains(relay)).collect::<Vec<_>>();
    named.iter().cloned().chain(owed).take(LINKS_MAX).collect()
}

async fn keep_one(profile: Arc<Profile>, relay: RelayUrl, options: LinkOptions, mut stopping: watch::Receiver<bool>) {
    let Some(mut redial) = redial(&profile, &relay, options) else { return };
    while !*stopping.borrow() {
        let opening = redial.open(|error| tell_trouble(&profile, &relay, error.to_string()));
        let link = tokio::select! {
            link = opening => link,
            _ = stopping.wait_for(|stop| *stop) => return,
        };
        let session = Session::new(link, relay.clone(), Arc::clone(&profile), options.answer_timeout);
        let running = session.run(Stay::Forever, stopping.clone());
        let ended = watched(running, &profile, &relay, &mut redial).await;
        if let Err(error) = &ended {
            tracing::info!(%relay, "the link ended: {error}");
        }
        if !*stopping.borrow() {
            tokio::select! {
                () = redial.pause() => {}
                _ = stopping.wait_for(|stop| *stop) => return,
            }
        }
    }
}

/// Runs a session; once it is live, the next wait is short again.
async fn watched<T>(running: impl Future<Output = T>, profile: &Profile, relay: &RelayUrl, redial: &mut Redial) -> T {
    tokio::pin!(running);
    let mut status = profile.status();
    let is_live = |status: &Status| status.relays.get(relay).is_some_and(|relay| relay.link == LinkState::Live);
    tokio::select! {
        ended = &mut running => return ended,
        live = status.wait_for(is_live) => {
            if live.is_ok() {
                redial.worked();
            }
        }
    }
    running.await
}

/// A URL that is none is told once; nothing else can be done with it.
fn redial(profile: &Arc<Profile>, relay: &RelayUrl, options: LinkOptions) -> Option<Redial> {
    let keys: Arc<[Keys]> = proofs(profile, relay);
    match dial::RelayUrl::parse(relay.as_str()) {
        Ok(url) => Some(Redial::new(url, options, keys, profile.world().clone())),
        Err(error) => {
            tell_trouble(profile, relay, error.to_string());
            None
        }
    }
}

/// Only relays that the user named learn who the user is without need.
fn proofs(profile: &Profile, relay: &RelayUrl) -> Arc<[Keys]> {
    let role = profile.routing().role(relay);
    if role.home || role.training { Arc::new([profile.keys().clone()]) } else { Arc::new([]) }
}

fn tell_trouble(profile: &Profile, relay: &RelayUrl, trouble: String) {
    profile.tell(relay, |status| (status.link, status.trouble) = (LinkState::Down, trouble));
}

/// How a visit to a relay ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Visit {
    /// Nothing differs, and nothing is owed.
    Settled,
    /// There is no link.
    Unreachable(String),
    /// It was not all done.
    Unfinished(String),
}

/// Visits every relay once: catches up, sends what is owed, and goes. What one relay gave, the others get. Takes
/// `time_max` at most.
pub async fn visit_all(profile: &Arc<Profile>, options: LinkOptions, time_max: Duration) -> BTreeMap<RelayUrl, Visit> {
    let until = tokio::time::Instant::now() + time_max;
    let mut visits = BTreeMap::new();
    for _ in 0..ROUNDS_MAX {
        let mut round = JoinSet::new();
        for relay in relays(profile).into_iter().filter(|relay| {
            // Who could not be reached a moment ago is not waited for again.
            visits.get(relay).is_none_or(|visit| *visit == Visit::Settled)
        }) {
            let profile = Arc::clone(profile);
            round.spawn(async move { (relay.clone(), visit(&profile, relay, options, until).await) });
        }
        let before = profile.cache().count();
        while let Some(Ok((relay, visit))) = round.join_next().await {
            visits.insert(relay, visit);
        }
        let is_alone = visits.len() < 2 && profile.status().borrow().waiting == 0;
        if is_alone || profile.cache().count() == before || tokio::time::Instant::now() >= until {
            break;
        }
    }
    visits
}

async fn visit(profile: &Arc<Profile>, relay: RelayUrl, options: LinkOptions, until: tokio::time::Instant) -> Visit {
    let Some(redial) = redial(profile, &relay, options) else {
        return Visit::Unreachable("the URL is none of a relay".to_owned());
    };
    let link = match tokio::time::timeout_at(until, redial.attempt()).await.unwrap_or(Err(LinkError::Silent)) {
        Ok(link) => link,
        Err(error) => {
            tell_trouble(profile, &relay, error.to_string());
            return Visit::Unreachable(error.to_string());
        }
    };
    let session = Session::new(link, relay.clone(), Arc::clone(profile), options.answer_timeout);
    let (stop, stopping) = watch::channel(false);
    let running = session.run(Stay::UntilSettled, stopping);
    tokio::pin!(running);
    let ended = tokio::select! {
        ended = &mut running => ended,
        () = tokio::time::sleep_until(until) => {
            let _ = stop.send(true);
            running.await
        }
    };
    match ended {
        Ok(Ended::Settled) => Visit::Settled,
        Ok(Ended::Stopped) => Visit::Unfinished("the time is up".to_owned()),
        Err(error) => Visit::Unfinished(error.to_string()),
    }
}
