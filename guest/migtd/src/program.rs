//! The program of a migration TD.

use kvm_ops_core::guest::{Action, GuestProgram, Outcome};
use kvm_ops_guest::tdx::REPORT_LEN;
use zeroize::Zeroizing;

use crate::failure::Failure;
use crate::handshake::{Ephemeral, Keys, Random};
use crate::identity::{EvidenceVerifier, Identity};
use crate::io::{Io, SessionKey};
use crate::message::Message;
use crate::policy::Policy;
use crate::request::{Exchange, Request, Role};
use crate::steps::Driven;

/// TDINFO in a TDREPORT.
const TDINFO: std::ops::Range<usize> = 512..1024;

/// The version of the session: the one that the module has (MIG_VERSION).
const SESSION_VERSION: u16 = 0;

/// What a sealed message is about.
const SOURCE_KEY: &[u8] = b"key of the source";
const TARGET_KEY: &[u8] = b"key of the target";
const DONE: &[u8] = b"done";

/// The page that stands for the program and its policy in the TD's measurement: the first of its launch.
fn image(policy: &Policy) -> Box<[u8; 4096]> {
    let mut page = Box::new([0; 4096]);
    let name = concat!("kvm-ops migration TD ", env!("CARGO_PKG_VERSION"), "\0");
    let parts = [name.as_bytes(), &policy.encode()].concat();
    // A policy has some 300 bytes at most.
    for (to, from) in page.iter_mut().zip(parts) {
        *to = from;
    }
    page
}

/// A migration TD as a guest program, for the first vCPU of a TD that starts with its
/// [image](Self::image) at address 0 and a page of zeros behind it, both measured.
///
/// It waits for requests of its host, one after the other.
pub struct Program {
    driven: Driven,
    image: Box<[u8; 4096]>,
}

impl Program {
    /// A program that judges peers by `policy`, whose page the TD's launch has, and believes the quotes
    /// that `verifier` believes. `random` fills memory with the guest's random numbers, as RDSEED gives them.
    pub fn new(
        policy: Policy,
        verifier: impl EvidenceVerifier + 'static,
        random: impl FnMut(&mut [u8]) -> kvm_ops_core::Result<()> + Send + 'static,
    ) -> Self {
        let driven = Driven::new(move |guest| {
            let td = Td {
                io: Io(guest),
                policy,
                verifier: Box::new(verifier),
                random: Box::new(random),
            };
            td.run()
        });
        Self {
            driven,
            image: image(&policy),
        }
    }

    /// The page that stands for the program and its policy in the TD's measurement.
    pub fn image(&self) -> Box<[u8; 4096]> {
        self.image.clone()
    }
}

impl GuestProgram for Program {
    fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
        self.driven.next(last)
    }
}

struct Td {
    io: Io,
    policy: Policy,
    verifier: Box<dyn EvidenceVerifier>,
    random: Box<Random>,
}

impl Td {
    /// Serves requests until the host takes something away that the program needs.
    async fn run(mut self) {
        if self.io.share().await.is_err() {
            return;
        }
        loop {
            let asked = match self.io.wait(Request::MAX).await {
                Ok(Some(asked)) => Request::decode(&asked).ok_or(Failure::Request),
                Ok(None) => continue,
                Err(Failure::Host) => return,
                Err(failure) => Err(failure),
            };
            let served = match asked {
                Ok(Request::Exchange(exchange)) => self.exchange(&exchange).await,
                Ok(Request::Describe) => self.describe().await,
                Err(failure) => Err(failure),
            };
            let (code, detail) = served.map_or_else(Failure::numbers, |()| (0, 0));
            if self.io.tell(code.into(), detail).await.is_err() {
                return;
            }
        }
    }

    /// Shows TDINFO to the host, which prebinds by its hash.
    async fn describe(&mut self) -> Result<(), Failure> {
        let report = self.io.report(&[0; 64]).await?;
        self.io.show(&report[TDINFO]).await
    }

    async fn exchange(&mut self, exchange: &Exchange) -> Result<(), Failure> {
        let done = match exchange.role {
            Role::Source => self.as_source(exchange).await,
            Role::Target => self.as_target(exchange).await,
        };
        if let Err(failure) = done
            && !matches!(failure, Failure::Closed | Failure::Refused(_))
        {
            let (code, _) = failure.numbers();
            // The failure counts, told or not.
            let _ = self.io.send(&Message::Refuse { code }.encode()).await;
        }
        done
    }

    async fn as_source(&mut self, exchange: &Exchange) -> Result<(), Failure> {
        let own = Ephemeral::new(&mut *self.random)?;
        let hello = Message::Hello { key: own.point() }.encode();
        self.io.send(&hello).await?;
        let reply = self.io.receive().await?;
        let Message::Reply { key, quote: theirs } = Message::decode(&reply)? else {
            return Err(Failure::Message);
        };
        let keys = Keys {
            source: own.point(),
            target: key,
        };
        let report = self.io.report(&keys.report_data(Role::Source)).await?;
        self.judge(&report, &theirs, &keys.report_data(Role::Target))?;
        let quote = self.io.quote(&report).await?;
        let mut sealer = own.agree(Role::Source, &key, &[&hello, &reply, &quote])?;
        let session = packed(&self.io.new_key(exchange).await?);
        let sealed = sealer.seal(SOURCE_KEY, &session)?;
        let message = Message::SourceKey { quote, sealed };
        self.io.send(&message.encode()).await?;
        let Message::TargetKey { sealed } = Message::decode(&self.io.receive().await?)? else {
            return Err(Failure::Message);
        };
        let (version, session) = unpacked(&sealer.open(TARGET_KEY, &sealed)?)?;
        self.io.set_key(exchange, version, &session).await?;
        let sealed = sealer.seal(DONE, &[])?;
        self.io.send(&Message::Done { sealed }.encode()).await
    }

    async fn as_target(&mut self, exchange: &Exchange) -> Result<(), Failure> {
        let hello = self.io.receive().await?;
        let Message::Hello { key } = Message::decode(&hello)? else {
            return Err(Failure::Message);
        };
        let own = Ephemeral::new(&mut *self.random)?;
        let keys = Keys {
            source: key,
            target: own.point(),
        };
        let report = self.io.report(&keys.report_data(Role::Target)).await?;
        let quote = self.io.quote(&report).await?;
        let point = own.point();
        let reply = Message::Reply { key: point, quote }.encode();
        self.io.send(&reply).await?;
        let message = Message::decode(&self.io.receive().await?)?;
        let Message::SourceKey { quote, sealed } = message else {
            return Err(Failure::Message);
        };
        self.judge(&report, &quote, &keys.report_data(Role::Source))?;
        let mut sealer = own.agree(Role::Target, &key, &[&hello, &reply, &quote])?;
        let (version, session) = unpacked(&sealer.open(SOURCE_KEY, &sealed)?)?;
        self.io.set_key(exchange, version, &session).await?;
        let session = packed(&self.io.new_key(exchange).await?);
        let sealed = sealer.seal(TARGET_KEY, &session)?;
        self.io
            .send(&Message::TargetKey { sealed }.encode())
            .await?;
        let Message::Done { sealed } = Message::decode(&self.io.receive().await?)? else {
            return Err(Failure::Message);
        };
        sealer.open(DONE, &sealed).map(drop)
    }

    /// Judges the peer by its quote: authentic, made for this exchange, and as the policy wants it.
    fn judge(
        &mut self,
        own: &[u8; REPORT_LEN],
        quote: &[u8],
        report_data: &[u8; 64],
    ) -> Result<(), Failure> {
        let peer = self.verifier.verify(quote);
        let peer = peer.map_err(|_| Failure::Evidence)?;
        if peer.report_data != *report_data {
            return Err(Failure::Binding);
        }
        let own = Identity::of_report(own);
        Ok(self.policy.judge(&own, &peer)?)
    }
}

/// A session key as it is sealed: the version of the session, then the words.
fn packed(key: &SessionKey) -> Zeroizing<Vec<u8>> {
    let mut out = Zeroizing::new(SESSION_VERSION.to_le_bytes().to_vec());
    for word in key.iter() {
        out.extend_from_slice(&word.to_le_bytes());
    }
    out
}

/// The reverse of [`packed`]. A peer with another version of the session is refused.
fn unpacked(plain: &[u8]) -> Result<(u16, SessionKey), Failure> {
    let (version, words) = plain.split_first_chunk().ok_or(Failure::Message)?;
    let version = u16::from_le_bytes(*version);
    let (words, rest) = words.as_chunks::<8>();
    let words = <[[u8; 8]; 4]>::try_from(words).map_err(|_| Failure::Message)?;
    match version == SESSION_VERSION && rest.is_empty() {
        true => Ok((version, Zeroizing::new(words.map(u64::from_le_bytes)))),
        false => Err(Failure::Message),
    }
}
