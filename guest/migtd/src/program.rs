//! The program of a migration TD.

use kvm_ops_core::guest::{Action, GuestProgram, Outcome};
use kvm_ops_guest::tdx::REPORT_LEN;
use zeroize::Zeroizing;

use crate::exchange::{Side, exchange};
use crate::failure::Failure;
use crate::handshake::Random;
use crate::identity::{EvidenceVerifier, Identity};
use crate::io::Io;
use crate::module::SessionKey;
use crate::policy::Policy;
use crate::request::{Exchange, Request};
use crate::steps::Driven;

/// TDINFO in a TDREPORT.
const TDINFO: std::ops::Range<usize> = 512..1024;

/// The version of the session: the one that the module has (MIG_VERSION).
const SESSION_VERSION: u16 = 0;

/// The page that stands for a program and its policy in the guest's measurement: the first of its launch.
pub(crate) fn image(name: &str, policy: &[u8]) -> Box<[u8; 4096]> {
    let mut page = Box::new([0; 4096]);
    let version = env!("CARGO_PKG_VERSION");
    let parts = [name, " ", version, "\0"].concat().into_bytes();
    // A policy has some 300 bytes at most.
    for (to, from) in page.iter_mut().zip(parts.iter().chain(policy)) {
        *to = *from;
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
            image: image(TdSide::NAME, &policy.encode()),
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
                Ok(Request::Exchange(of)) => self.exchange(of).await,
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

    async fn exchange(&mut self, of: Exchange) -> Result<(), Failure> {
        let mut side = TdSide { td: self, of };
        exchange(&mut side, of.role).await.map(drop)
    }
}

/// A migration TD in an exchange of the keys of a bound TD.
struct TdSide<'t> {
    td: &'t mut Td,
    of: Exchange,
}

impl Side for TdSide<'_> {
    const NAME: &'static str = "kvm-ops migration TD";
    type Report = [u8; REPORT_LEN];

    fn io(&self) -> Io {
        self.td.io.clone()
    }

    fn random(&mut self) -> &mut Random {
        &mut *self.td.random
    }

    async fn report(&mut self, data: &[u8; 64]) -> Result<Self::Report, Failure> {
        self.td.io.report(data).await
    }

    async fn evidence(&mut self, report: &Self::Report) -> Result<Vec<u8>, Failure> {
        self.td.io.quote(report).await
    }

    fn judge(
        &mut self,
        own: &Self::Report,
        quote: &[u8],
        report_data: &[u8; 64],
    ) -> Result<(), Failure> {
        let peer = self.td.verifier.verify(quote);
        let peer = peer.map_err(|_| Failure::Evidence)?;
        if peer.report_data != *report_data {
            return Err(Failure::Binding);
        }
        let own = Identity::of_report(own);
        Ok(self.td.policy.judge(&own, &peer)?)
    }

    async fn give(&mut self) -> Result<Zeroizing<Vec<u8>>, Failure> {
        Ok(packed(&self.td.io.new_key(&self.of).await?))
    }

    async fn take(&mut self, secret: &[u8]) -> Result<(), Failure> {
        let (version, session) = unpacked(secret)?;
        self.td.io.set_key(&self.of, version, &session).await
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
