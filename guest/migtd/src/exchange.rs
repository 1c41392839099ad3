//! The exchange between two guests of one kind, as each end goes through it.

use zeroize::Zeroizing;

use crate::failure::Failure;
use crate::handshake::{Ephemeral, Keys, Random};
use crate::io::Io;
use crate::message::Message;
use crate::request::Role;
use crate::seal::Sealer;

/// What a sealed message is about.
const SOURCE_KEY: &[u8] = b"key of the source";
const TARGET_KEY: &[u8] = b"key of the target";
const DONE: &[u8] = b"done";

/// What differs between the kinds of guests that exchange keys.
pub(crate) trait Side: Send {
    /// The name of the kind, which is in everything that is derived and reported.
    const NAME: &'static str;
    /// A report of the guest on itself.
    type Report: Send + Sync;

    fn io(&self) -> Io;
    fn random(&mut self) -> &mut Random;

    /// A report over this data.
    fn report(
        &mut self,
        data: &[u8; 64],
    ) -> impl Future<Output = Result<Self::Report, Failure>> + Send;

    /// The evidence that others can verify, of a report.
    fn evidence(
        &mut self,
        report: &Self::Report,
    ) -> impl Future<Output = Result<Vec<u8>, Failure>> + Send;

    /// Judges the peer by its evidence: authentic, over this data, and as the policy wants it.
    fn judge(
        &mut self,
        own: &Self::Report,
        evidence: &[u8],
        data: &[u8; 64],
    ) -> Result<(), Failure>;

    /// The secret for a peer that was judged.
    fn give(&mut self) -> impl Future<Output = Result<Zeroizing<Vec<u8>>, Failure>> + Send;

    /// Takes the secret of the peer.
    fn take(&mut self, secret: &[u8]) -> impl Future<Output = Result<(), Failure>> + Send;
}

/// Judges the peer and exchanges secrets with it. Returns the keys that both have then.
///
/// A failure of this end is told to the peer.
pub(crate) async fn exchange<S: Side>(side: &mut S, role: Role) -> Result<Sealer, Failure> {
    let done = match role {
        Role::Source => as_source(side).await,
        Role::Target => as_target(side).await,
    };
    if let Err(failure) = &done
        && !matches!(failure, Failure::Closed | Failure::Refused(_))
    {
        let (code, _) = failure.numbers();
        // The failure counts, told or not.
        let _ = side.io().send(&Message::Refuse { code }.encode()).await;
    }
    done
}

async fn as_source<S: Side>(side: &mut S) -> Result<Sealer, Failure> {
    let io = side.io();
    let own = Ephemeral::new(side.random())?;
    let hello = Message::Hello { key: own.point() }.encode();
    io.send(&hello).await?;
    let reply = io.receive().await?;
    let Message::Reply { key, quote: theirs } = Message::decode(&reply)? else {
        return Err(Failure::Message);
    };
    let keys = Keys {
        source: own.point(),
        target: key,
    };
    let report = side
        .report(&keys.report_data(S::NAME, Role::Source))
        .await?;
    side.judge(&report, &theirs, &keys.report_data(S::NAME, Role::Target))?;
    let quote = side.evidence(&report).await?;
    let mut sealer = own.agree(S::NAME, Role::Source, &key, &[&hello, &reply, &quote])?;
    let secret = side.give().await?;
    let sealed = sealer.seal(SOURCE_KEY, &secret)?;
    io.send(&Message::SourceKey { quote, sealed }.encode())
        .await?;
    let Message::TargetKey { sealed } = Message::decode(&io.receive().await?)? else {
        return Err(Failure::Message);
    };
    let secret = sealer.open(TARGET_KEY, &sealed)?;
    side.take(&secret).await?;
    let sealed = sealer.seal(DONE, &[])?;
    io.send(&Message::Done { sealed }.encode()).await?;
    Ok(sealer)
}

async fn as_target<S: Side>(side: &mut S) -> Result<Sealer, Failure> {
    let io = side.io();
    let hello = io.receive().await?;
    let Message::Hello { key } = Message::decode(&hello)? else {
        return Err(Failure::Message);
    };
    let own = Ephemeral::new(side.random())?;
    let keys = Keys {
        source: key,
        target: own.point(),
    };
    let report = side
        .report(&keys.report_data(S::NAME, Role::Target))
        .await?;
    let quote = side.evidence(&report).await?;
    let point = own.point();
    let reply = Message::Reply { key: point, quote }.encode();
    io.send(&reply).await?;
    let Message::SourceKey { quote, sealed } = Message::decode(&io.receive().await?)? else {
        return Err(Failure::Message);
    };
    side.judge(&report, &quote, &keys.report_data(S::NAME, Role::Source))?;
    let mut sealer = own.agree(S::NAME, Role::Target, &key, &[&hello, &reply, &quote])?;
    let secret = sealer.open(SOURCE_KEY, &sealed)?;
    side.take(&secret).await?;
    let secret = side.give().await?;
    let sealed = sealer.seal(TARGET_KEY, &secret)?;
    io.send(&Message::TargetKey { sealed }.encode()).await?;
    let Message::Done { sealed } = Message::decode(&io.receive().await?)? else {
        return Err(Failure::Message);
    };
    sealer.open(DONE, &sealed)?;
    Ok(sealer)
}
