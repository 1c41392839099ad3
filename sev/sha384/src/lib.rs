#![doc = include_str!("../README.md")]

#[cfg(target_arch = "x86_64")]
mod lanes;

use sha2::{Digest as _, Sha384};

/// Bytes of a page.
pub const PAGE_SIZE: usize = 4096;

/// A page.
pub type Page = [u8; PAGE_SIZE];

/// A SHA-384 digest.
pub type Digest = [u8; 48];

/// The most pages that are hashed at once on any processor. Work that is split among threads is
/// best split at multiples of it.
pub const LANES: usize = 8;

/// The SHA-384 of each page, in their order.
pub fn pages(pages: &[&Page]) -> Vec<Digest> {
    let mut digests = vec![[0; 48]; pages.len()];
    pages_into(pages, &mut digests);
    digests
}

/// Writes the SHA-384 of each page to its place in `digests`. If the lengths differ, the shorter one
/// counts.
pub fn pages_into(pages: &[&Page], digests: &mut [Digest]) {
    Lanes::of_this_processor().pages_into(pages, digests);
}

/// The ways to hash, by what they need of the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lanes {
    /// One page after another.
    One,
    /// Four pages in AVX2 registers.
    #[cfg(target_arch = "x86_64")]
    Four,
    /// Eight pages in AVX-512 registers.
    #[cfg(target_arch = "x86_64")]
    Eight,
}

impl Lanes {
    fn of_this_processor() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return Self::Eight;
            }
            if is_x86_feature_detected!("avx2") {
                return Self::Four;
            }
        }
        Self::One
    }

    /// Must only be called with lanes that this processor has.
    fn pages_into(self, pages: &[&Page], digests: &mut [Digest]) {
        let count = pages.len().min(digests.len());
        let (pages, digests) = (&pages[..count], &mut digests[..count]);
        match self {
            Self::One => one_by_one(pages, digests),
            #[cfg(target_arch = "x86_64")]
            Self::Four => in_groups(pages, digests, |group| {
                debug_assert!(is_x86_feature_detected!("avx2"));
                // SAFETY: this variant is made where the processor has AVX2.
                unsafe { lanes::four::pages(group) }
            }),
            #[cfg(target_arch = "x86_64")]
            Self::Eight => in_groups(pages, digests, |group| {
                debug_assert!(is_x86_feature_detected!("avx512f"));
                // SAFETY: this variant is made where the processor has AVX-512F.
                unsafe { lanes::eight::pages(group) }
            }),
        }
    }
}

fn one_by_one(pages: &[&Page], digests: &mut [Digest]) {
    for (page, digest) in pages.iter().zip(digests) {
        *digest = Sha384::digest(page).into();
    }
}

/// Hashes `N` pages at a time. The last group repeats its last page in the lanes that are left.
#[cfg(target_arch = "x86_64")]
fn in_groups<const N: usize>(
    pages: &[&Page],
    digests: &mut [Digest],
    hash: impl Fn([&Page; N]) -> [Digest; N],
) {
    for (pages, digests) in pages.chunks(N).zip(digests.chunks_mut(N)) {
        let [.., last] = pages else { return };
        if pages.len() == 1 {
            one_by_one(pages, digests);
            continue;
        }
        let group = std::array::from_fn(|lane| *pages.get(lane).unwrap_or(last));
        for (digest, value) in digests.iter_mut().zip(hash(group)) {
            *digest = value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Every way that this processor has.
    fn ways() -> Vec<Lanes> {
        let mut ways = vec![Lanes::One];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") {
                ways.push(Lanes::Four);
            } else {
                println!("skipped four lanes: the processor has no AVX2");
            }
            if is_x86_feature_detected!("avx512f") {
                ways.push(Lanes::Eight);
            } else {
                println!("skipped eight lanes: the processor has no AVX-512");
            }
        }
        ways
    }

    fn page(seed: u64) -> Page {
        let mut state = seed;
        std::array::from_fn(|_| {
            state = state
                .wrapping_mul(0x5851_f42d_4c95_7f2d)
                .wrapping_add(0x1405_7b7e_f767_814f);
            (state >> 56) as u8
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn every_way_gives_each_page_the_digest_of_sha2(seeds in prop::collection::vec(any::<u64>(), 0..20)) {
            let contents: Vec<Page> = seeds.iter().copied().map(page).collect();
            let pages: Vec<&Page> = contents.iter().collect();
            let want: Vec<Digest> = pages.iter().map(|page| Sha384::digest(page).into()).collect();
            for way in ways() {
                let mut digests = vec![[0; 48]; pages.len()];
                way.pages_into(&pages, &mut digests);
                prop_assert_eq!(&digests, &want, "{:?}", way);
            }
        }
    }

    /// The value of `sha384sum` for 4096 zero bytes, so that this is not held against sha2 alone.
    #[test]
    fn every_way_knows_the_digest_of_a_zero_page() {
        let zeros = [0; PAGE_SIZE];
        for way in ways() {
            let mut digests = [[0; 48]; LANES + 1];
            way.pages_into(&[&zeros; LANES + 1], &mut digests);
            for digest in digests {
                let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
                assert_eq!(hex, ZERO_PAGE, "{way:?}");
            }
        }
    }

    const ZERO_PAGE: &str = "c0e59a3e3ffbd3b5c75428fb36432facabc745944296ff515f737c4fef4efc64\
        586809f7a16f56354a1eaecf2aa8d774";

    #[test]
    fn the_shorter_slice_counts() {
        let zeros = [0; PAGE_SIZE];
        for way in ways() {
            let mut digests = [[0xee; 48]; 3];
            way.pages_into(&[&zeros; 2], &mut digests);
            assert_ne!(digests[1], [0xee; 48], "{way:?}");
            assert_eq!(digests[2], [0xee; 48], "{way:?}");
            let mut digests = [[0xee; 48]; 1];
            way.pages_into(&[&zeros; 3], &mut digests);
            assert_ne!(digests[0], [0xee; 48], "{way:?}");
        }
    }
}
