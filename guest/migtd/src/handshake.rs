//! The key agreement: ephemeral keys on P-256, to which each end's evidence is bound.

use p256::ecdh::diffie_hellman;
use p256::elliptic_curve::sec1::ToEncodedPoint;
use p256::{PublicKey, SecretKey};
use sha2::{Digest, Sha512};
use zeroize::Zeroizing;

use crate::failure::Failure;
use crate::message::Point;
use crate::request::Role;
use crate::seal::Sealer;

/// Fills memory with random numbers.
pub(crate) type Random = dyn FnMut(&mut [u8]) -> kvm_ops_core::Result<()> + Send;

/// The ephemeral key of one exchange.
pub(crate) struct Ephemeral {
    secret: SecretKey,
    point: Point,
}

/// The public keys of both ends.
#[derive(Clone, Copy)]
pub(crate) struct Keys {
    pub(crate) source: Point,
    pub(crate) target: Point,
}

impl Keys {
    /// What the report of this end is over: it binds the evidence to both keys of this exchange, which are new at each, and to
    /// the end. So evidence of another exchange does not fit, nor the peer's own that comes back to it. `name` is the kind of guest.
    pub(crate) fn report_data(&self, name: &str, role: Role) -> [u8; 64] {
        let hash = Sha512::new()
            .chain_update(name)
            .chain_update(", version 1")
            .chain_update([role as u8])
            .chain_update(self.source)
            .chain_update(self.target)
            .finalize();
        hash.into()
    }
}

/// Tries of a random number that is no key; each fails with a chance of 2^-32 at most.
const TRIES: u32 = 8;

impl Ephemeral {
    pub(crate) fn new(random: &mut Random) -> Result<Self, Failure> {
        let mut bytes = Zeroizing::new([0; 32]);
        let mut draw = || {
            random(&mut *bytes).ok()?;
            SecretKey::from_slice(&*bytes).ok()
        };
        let drawn = (0..TRIES).find_map(|_| draw());
        let secret = drawn.ok_or(Failure::Random)?;
        let encoded = secret.public_key().to_encoded_point(false);
        // A public key is never the point at infinity, the one with a shorter form.
        let point = encoded.as_bytes().try_into().map_err(|_| Failure::Random)?;
        Ok(Self { secret, point })
    }

    /// The public key.
    pub(crate) fn point(&self) -> Point {
        self.point
    }

    /// Agrees with the peer's key, after everything in `said`.
    pub(crate) fn agree(
        &self,
        name: &str,
        role: Role,
        peer: &Point,
        said: &[&[u8]],
    ) -> Result<Sealer, Failure> {
        // A point that is not on the curve is refused here.
        let peer = PublicKey::from_sec1_bytes(peer).map_err(|_| Failure::Message)?;
        let shared = diffie_hellman(self.secret.to_nonzero_scalar(), peer.as_affine());
        Ok(Sealer::new(name, role, &shared, said))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    const NAME: &str = "a guest";

    /// Different numbers at each call, for tests.
    fn random(out: &mut [u8]) -> kvm_ops_core::Result<()> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        out.fill(0x5a);
        out[..8].copy_from_slice(&next.to_le_bytes());
        Ok(())
    }

    /// Two ends that agreed, over what each of them saw.
    fn ends(at_source: &[u8], at_target: &[u8]) -> (Sealer, Sealer) {
        let (source, target) = (Ephemeral::new(&mut random), Ephemeral::new(&mut random));
        let (source, target) = (source.unwrap(), target.unwrap());
        let one = source.agree(NAME, Role::Source, &target.point(), &[at_source]);
        let other = target.agree(NAME, Role::Target, &source.point(), &[at_target]);
        (one.ok().unwrap(), other.ok().unwrap())
    }

    #[test]
    fn what_one_end_seals_the_other_opens_once_and_in_order() {
        let (mut source, mut target) = ends(b"same", b"same");
        let first = source.seal(b"1", b"key").unwrap();
        let second = source.seal(b"2", b"").unwrap();
        assert_eq!(&**target.open(b"1", &first).unwrap(), b"key");
        assert_eq!(target.open(b"1", &first).err(), Some(Failure::Seal));
        let (mut source, mut target) = ends(b"same", b"same");
        assert_eq!(source.open(b"1", &first).err(), Some(Failure::Seal));
        assert_eq!(target.open(b"2", &second).err(), Some(Failure::Seal));
        let answer = target.seal(b"3", b"other").unwrap();
        let (mut late, _) = ends(b"same", b"same");
        assert_eq!(late.open(b"3", &answer).err(), Some(Failure::Seal));
        assert_eq!(source.open(b"3", &answer).err(), Some(Failure::Seal));
    }

    #[test]
    fn a_message_is_bound_to_its_kind_and_its_direction() {
        let (mut source, mut target) = ends(b"same", b"same");
        let sealed = source.seal(b"1", b"key").unwrap();
        assert_eq!(source.open(b"1", &sealed).err(), Some(Failure::Seal));
        assert_eq!(target.open(b"2", &sealed).err(), Some(Failure::Seal));
    }

    #[test]
    fn ends_that_saw_different_things_do_not_understand_each_other() {
        let (mut source, mut target) = ends(b"this", b"that");
        let sealed = source.seal(b"1", b"key").unwrap();
        assert_eq!(target.open(b"1", &sealed).err(), Some(Failure::Seal));
    }

    #[test]
    fn without_random_numbers_there_is_no_key() {
        let mut none = |_: &mut [u8]| Err(kvm_ops_core::Error::Again);
        assert_eq!(Ephemeral::new(&mut none).err(), Some(Failure::Random));
        let mut zeros = |out: &mut [u8]| {
            out.fill(0);
            Ok(())
        };
        assert_eq!(Ephemeral::new(&mut zeros).err(), Some(Failure::Random));
    }

    #[test]
    fn a_key_that_is_no_point_is_refused() {
        let own = Ephemeral::new(&mut random).unwrap();
        for peer in [[0; 65], [4; 65], [0xff; 65]] {
            let agreed = own.agree(NAME, Role::Source, &peer, &[]);
            assert_eq!(agreed.err(), Some(Failure::Message));
        }
    }

    #[test]
    fn report_data_tells_ends_and_exchanges_apart() {
        let keys = Keys {
            source: [1; 65],
            target: [2; 65],
        };
        let turned = Keys {
            source: [2; 65],
            target: [1; 65],
        };
        let other = Keys {
            target: [3; 65],
            ..keys
        };
        let all = [keys, turned, other]
            .map(|keys| [Role::Source, Role::Target].map(|role| keys.report_data(NAME, role)));
        let mut all = all.as_flattened().to_vec();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 6);
    }
}
