//! `sledge serve`.

use std::io::{ErrorKind, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use rustix::process::{Resource, getrlimit, setrlimit};

use super::interrupt::Interrupt;
use super::operate::{Operation, Reread};
use super::store::Opened;
use super::systemd::{self, Manager};
use super::{store, sync, takeover};
use crate::client::clock::World;
use crate::client::link::LinkOptions;
use crate::client::mirrors::{Mirror, Mirrors};
use crate::config::{self, Config};
use crate::error::Error;
use crate::relay::Clock;
use crate::server::control::SyncRequest;
use crate::server::{Server, Sockets, listens_on};

/// Run the relay until SIGINT or SIGTERM
///
/// Runs the relay: WebSocket, relay information (NIP-11) and a landing page on one port. Creates the data directory
/// when there is none. SIGINT or SIGTERM ends it after what was accepted is answered and stored; a second signal ends
/// it at once, which loses nothing that was answered either. SIGHUP, or a change of the settings file, has the settings read
/// again; what needs a restart is named in the log.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sledge serve
  sledge --store /var/lib/sledge serve --listen 0.0.0.0:7777
  sledge serve --take-over")]
pub struct ServeArgs {
    /// Address and port [default: `listen` in the settings, else 127.0.0.1:7777]
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: Option<SocketAddr>,

    /// Take the place of a relay that runs on the same store: it passes its sockets on and ends, and no connection is
    /// refused meanwhile. For upgrades
    #[arg(long)]
    pub take_over: bool,
}

/// Threads that run connections. They wait for sockets only; more cores than this serve queries and the writer.
const WORKERS_MAX: usize = 8;

/// Open files beside the connections: the store's, the listener, standard streams.
const OTHER_FILES: u64 = 512;

/// Runs the relay to its end.
pub fn run(
    args: &ServeArgs,
    mut config: Config,
    file: Option<PathBuf>,
    store: Option<String>,
) -> Result<ExitCode, Error> {
    if let Some(listen) = args.listen {
        config.listen = listen;
    }
    let mirrors = mirrors(&config)?;
    let config = Arc::new(config);
    let reread = Reread { file, store, listen: args.listen };
    let passed = systemd::passed_listener();
    raise_open_files(&config);
    let (mut opened, taken) = match args.take_over {
        true => takeover::open(&config)?,
        false => (store::open_any(&config)?, None),
    };
    opened.take_control_dir(&config);
    let sockets = sockets_for(&config, passed, taken);
    log_opening(&config, &opened);
    warn_of_unknown_name(&config);
    let interrupt = Interrupt::watch()?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores.clamp(2, WORKERS_MAX))
        .enable_all()
        .build()
        .map_err(|error| Error::Failed(format!("cannot start the relay's threads: {error}")))?;
    let served = runtime.block_on(async {
        let operation = Operation::watch(interrupt, Manager::from_env(), reread)?;
        serve(&config, &opened, sockets, mirrors, operation).await
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    served.map(|()| ExitCode::SUCCESS)
}

/// The sockets to listen on, where there are some already: what the service manager passes is what the operator wants; those
/// of the relay before this one only if the settings still name their addresses. None: make them.
fn sockets_for(config: &Config, passed: Option<TcpListener>, taken: Option<Sockets>) -> Option<Sockets> {
    let (plain, encrypted) = taken.map_or((None, None), |taken| (Some(taken.plain), taken.encrypted));
    let plain = passed.or(plain.filter(|plain| listens_on(plain, config.listen)));
    // Without the plain one everything begins anew, which happens where its address was changed.
    plain.map(|plain| Sockets { plain, encrypted })
}

async fn serve(
    config: &Arc<Config>,
    opened: &Opened,
    sockets: Option<Sockets>,
    mirrors: Vec<Mirror>,
    mut operation: Operation,
) -> Result<(), Error> {
    let store = opened.store();
    let server = match sockets {
        Some(sockets) => Server::start_on(sockets, Arc::clone(config), store, Clock::system()),
        None => Server::start(Arc::clone(config), store, Clock::system()).await,
    };
    let mut server = server.map_err(|error| cannot_listen(config.listen, &error))?;
    if let Some(dir) = opened.control_dir()
        && let Err(error) = server.listen_for_commands(&dir)
    {
        tracing::warn!(%error, "no control socket: `sledge compact` and `sledge status` will not reach this relay");
    }
    if let Some(store) = opened.in_directory() {
        server.watch_disk_of(&store.path());
    }
    let owner = format!("sledge serve (process {}) on ws://{}", std::process::id(), reachable(server.addr()));
    opened.describe_owner(&owner);
    server.reach_out_by(Arc::new(sync::ByRelay { relay: server.relay().clone() }));
    let options = LinkOptions::from(&config.client);
    let mut mirrors = Mirrors::start(server.relay(), mirrors, options, &World::system());
    let metrics = server.serve_metrics().await;
    metrics.map_err(|error| Error::Failed(format!("cannot serve metrics (operation.metrics_listen): {error}")))?;
    announce(server.addr());
    operation.run(&server, &mut mirrors).await;
    mirrors.stop().await;
    tracing::info!("stopping; a second signal stops at once");
    let started = Instant::now();
    server.stop().await.map_err(|error| Error::Failed(format!("the last writes failed: {error}")))?;
    let stats = opened.stats();
    tracing::info!(events = stats.events, log_bytes = stats.log_bytes, took = ?started.elapsed(), "stopped");
    Ok(())
}

/// The relays that the settings name.
pub fn mirrors(config: &Config) -> Result<Vec<Mirror>, Error> {
    let mirror = |mirror: &config::Mirror| {
        let key = Some(PathBuf::from(&mirror.key)).filter(|key| !key.as_os_str().is_empty());
        let (url, filters) = (mirror.url.clone(), mirror.filters.clone());
        let asked = SyncRequest { url, filters, direction: mirror.direction, private: mirror.private, key };
        sync::mirror(&asked, config).map_err(|problem| config.refuse("mirror", problem).into())
    };
    config.mirror.iter().map(mirror).collect()
}

fn cannot_listen(addr: SocketAddr, error: &std::io::Error) -> Error {
    let hint = match error.kind() {
        ErrorKind::AddrInUse => {
            "; another program uses it, perhaps another relay: stop that, or choose another port with --listen"
        }
        ErrorKind::AddrNotAvailable => "; this machine does not have the address: choose another with --listen",
        ErrorKind::PermissionDenied => "; ports below 1024 need a privilege: choose another with --listen",
        _ => "",
    };
    Error::Failed(format!("cannot listen on {addr}: {error}{hint}"))
}

/// The address at which this machine reaches a listener.
fn reachable(mut addr: SocketAddr) -> SocketAddr {
    match addr.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => addr.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => addr.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    addr
}

/// Says where the relay listens, whatever the log level: whoever asked for port 0 has to know.
fn announce(addr: SocketAddr) {
    if tracing::enabled!(tracing::Level::INFO) {
        tracing::info!("listening on ws://{addr}");
    } else {
        // A closed standard error is no reason to stop.
        let _ = writeln!(std::io::stderr(), "listening on ws://{addr}");
    }
}

/// Clients sign for which relay they authenticate; one that does not know its public name can check only local ones.
fn warn_of_unknown_name(config: &Config) {
    if config.service_url.is_empty() && !config.listen.ip().is_loopback() {
        tracing::warn!(
            "service_url is not set: clients that reach this relay under a public name cannot authenticate (NIP-42), \
             so they cannot read their direct messages here"
        );
    }
}

fn log_opening(config: &Config, opened: &Opened) {
    let (store, events) = (store::shown(config), opened.stats().events);
    match opened.in_directory() {
        Some(embedded) => {
            let (path, replayed) = (embedded.path(), embedded.open_report().replayed);
            tracing::info!(path = %path.display(), events, replayed, "the store is open");
        }
        None => tracing::info!(store, events, "the store is open"),
    }
}

/// Raises the soft limit on open files as far as needed and allowed; says so where connections will be refused.
pub fn raise_open_files(config: &Config) {
    raise_open_files_to(config.limits.connections_max as u64 + OTHER_FILES);
}

fn raise_open_files_to(needed: u64) {
    let mut limit = getrlimit(Resource::Nofile);
    let Some(current) = limit.current.filter(|current| *current < needed) else { return };
    let raised = limit.maximum.map_or(needed, |maximum| needed.min(maximum));
    limit.current = Some(raised);
    let in_force = if setrlimit(Resource::Nofile, limit).is_ok() { raised } else { current };
    if in_force < needed {
        tracing::warn!(
            "this process may open {in_force} files, and limits.connections_max asks for {needed}; raise the limit \
             (`ulimit -n`, LimitNOFILE= in a systemd unit) or lower connections_max"
        );
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Nobody can connect to "all addresses"; every other address stands.
    #[test]
    fn all_addresses_are_reached_on_loopback() {
        for (listens, reached) in [
            ("0.0.0.0:7777", "127.0.0.1:7777"),
            ("[::]:7777", "[::1]:7777"),
            ("127.0.0.1:1", "127.0.0.1:1"),
            ("192.168.1.2:80", "192.168.1.2:80"),
        ] {
            assert_eq!(reachable(listens.parse().unwrap()).to_string(), reached);
        }
    }

    /// The limit never sinks, and reaches what is needed where the hard limit allows.
    #[test]
    fn the_limit_on_open_files_only_rises() {
        let before = getrlimit(Resource::Nofile);
        raise_open_files_to(1);
        assert_eq!(getrlimit(Resource::Nofile).current, before.current);
        let needed = before.current.unwrap_or(1_024) + 1;
        raise_open_files_to(needed);
        let reached = before.maximum.map_or(needed, |maximum| needed.min(maximum));
        assert_eq!(getrlimit(Resource::Nofile).current, before.current.map(|_| reached));
    }
}
