//! Quotes of TDs, their chains and their collateral.

use std::num::NonZeroUsize;
use std::sync::OnceLock;

use dcap_qvl::QuoteCollateralV3;

use super::fields::{Field, of_certificate, starts};
use super::{Fate, FlipError, Line, Piece, authentic, flip};
use crate::row::Waivers;
use crate::tdx::{self, Evidence, Expected, Quote, Remembering, Root, verify_by};
use crate::x509::{Certificate, bundle};

/// The reason for bits of PEM that change nothing.
const PEM: &str = "text around the certificates: what is decoded is the same";
/// The reason for bits of a certificate of the collateral that change nothing.
const NEEDLESS: &str = "not used: the evidence is authentic without this certificate, too";
const BEGIN: &[u8] = b"-----BEGIN CERTIFICATE-----";
/// A text that stands for the piece that is changed.
const MARK: &str = "the piece";

/// Flips bits of a quote, of each certificate of its chain, and of its collateral: of each field the
/// first, and every `every`th from there. With 1, every bit.
///
/// # Errors
///
/// [`FlipError::Refused`] if the evidence is not authentic as it is.
pub fn quote(
    evidence: &Evidence<'_>,
    root: &Root,
    now: u64,
    every: NonZeroUsize,
) -> Result<Vec<Line>, FlipError> {
    let verifier = Verifier {
        evidence: *evidence,
        root,
        now,
    };
    let verified = tdx::verify(evidence, root, &Expected::default(), &Waivers::none(), now);
    authentic(&verified.verdict)?;
    let refused = |check| move |why: String| FlipError::Refused { check, why };
    let form = "the quote cannot be taken apart";
    let original = verified.quote.ok_or_else(|| refused("form")(form.into()))?;
    let mut pieces = vec![verifier.quote(&original)];
    pieces.extend(verifier.pck_chain(&original).map_err(refused("form"))?);
    let collateral: QuoteCollateralV3 = serde_json::from_slice(evidence.collateral)
        .map_err(|error| refused("collateral")(error.to_string()))?;
    let collateral = verifier.collateral(&collateral);
    pieces.extend(collateral.map_err(refused("collateral"))?);
    Ok(flip(&pieces, every))
}

/// Verifies evidence of which one part is changed.
#[derive(Clone, Copy)]
struct Verifier<'a> {
    evidence: Evidence<'a>,
    root: &'a Root,
    now: u64,
}

impl<'a> Verifier<'a> {
    fn verify(&self, quote: &[u8], collateral: &[u8]) -> Fate {
        let evidence = Evidence {
            quote,
            collateral,
            event_log: None,
        };
        let (expected, waivers) = (Expected::default(), Waivers::none());
        // All but one signature are those of the evidence as it came.
        let verified =
            verify_by::<Remembering>(&evidence, self.root, &expected, &waivers, self.now);
        Fate::of(&verified.verdict)
    }

    fn quote(self, original: &Quote) -> Piece<'a> {
        let bytes = self.evidence.quote;
        let chain = original.pck_chain.clone();
        // Only what is behind the first certificate's begin can differ by its text alone.
        let pem = find(bytes, BEGIN).unwrap_or(bytes.len());
        Piece {
            name: "quote".into(),
            bytes: bytes.to_vec(),
            fields: of_quote(bytes, original),
            judge: Box::new(move |changed| {
                let fate = self.verify(changed, self.evidence.collateral);
                fate.or_outside(PEM, || {
                    let same = changed[..pem] == bytes[..pem];
                    same && Quote::from_bytes(changed).is_ok_and(|quote| quote.pck_chain == chain)
                })
            }),
        }
    }

    /// The certificates of the quote, each changed in DER and put back as PEM.
    fn pck_chain(self, original: &Quote) -> Result<Vec<Piece<'a>>, String> {
        let mut pieces = Vec::new();
        for (place, der) in original.pck_chain.iter().enumerate() {
            let (original, name) = (original.clone(), name("PCK chain", der)?);
            pieces.push(Piece {
                name,
                bytes: der.clone(),
                fields: of_certificate(der),
                judge: Box::new(move |changed| {
                    let mut chain = original.pck_chain.clone();
                    chain[place] = changed.to_vec();
                    let quote = with_chain(self.evidence.quote, &original, &chain);
                    self.verify(&quote, self.evidence.collateral)
                }),
            });
        }
        Ok(pieces)
    }

    /// The parts of the collateral, and the certificates of its chains.
    fn collateral(self, original: &QuoteCollateralV3) -> Result<Vec<Piece<'a>>, String> {
        let chains: [(&str, &str, Put); 3] = [
            ("TCB info", &original.tcb_info_issuer_chain, |c, text| {
                c.tcb_info_issuer_chain = text;
            }),
            (
                "QE identity",
                &original.qe_identity_issuer_chain,
                |c, text| {
                    c.qe_identity_issuer_chain = text;
                },
            ),
            ("PCK list", &original.pck_crl_issuer_chain, |c, text| {
                c.pck_crl_issuer_chain = text;
            }),
        ];
        let mut pieces = self.signed(original);
        for (whose, chain, put) in chains {
            let chain = bundle(chain.as_bytes()).map_err(|error| error.to_string())?;
            for place in 0..chain.len() {
                pieces.push(self.issuer(whose, original, &chain, place, put)?);
            }
        }
        Ok(pieces)
    }

    /// A certificate of a chain of the collateral.
    fn issuer(
        self,
        whose: &str,
        original: &QuoteCollateralV3,
        chain: &[Certificate],
        place: usize,
        put: Put,
    ) -> Result<Piece<'a>, String> {
        let der = chain[place].as_der().to_vec();
        let (original, chain) = (original.clone(), chain.to_vec());
        let verify =
            move |with: Option<&[u8]>| {
                let pems = chain.iter().enumerate().filter_map(|(n, certificate)| {
                    match (n == place, with) {
                        (true, Some(changed)) => Some(Certificate::pem_of(changed)),
                        (true, None) => None,
                        (false, _) => Some(certificate.to_pem()),
                    }
                });
                let mut changed = original.clone();
                put(&mut changed, pems.collect());
                // Of strings and bytes only: it can be written.
                let json = serde_json::to_vec(&changed).unwrap_or_default();
                self.verify(self.evidence.quote, &json)
            };
        let needless = OnceLock::new();
        Ok(Piece {
            name: name(whose, &der)?,
            fields: of_certificate(&der),
            bytes: der,
            judge: Box::new(move |changed| {
                let without = || *needless.get_or_init(|| verify(None) == Fate::Believed);
                verify(Some(changed)).or_outside(NEEDLESS, without)
            }),
        })
    }

    /// What is signed in the collateral, the signatures, and the revocation lists.
    fn signed(self, original: &QuoteCollateralV3) -> Vec<Piece<'a>> {
        let texts: [(&str, &str, Put); 2] = [
            ("TCB info", &original.tcb_info, |c, text| c.tcb_info = text),
            ("QE identity", &original.qe_identity, |c, text| {
                c.qe_identity = text;
            }),
        ];
        let binaries: [(&str, &[u8], PutBytes); 4] = [
            (
                "TCB info: signature",
                &original.tcb_info_signature,
                |c, bytes| {
                    c.tcb_info_signature = bytes;
                },
            ),
            (
                "QE identity: signature",
                &original.qe_identity_signature,
                |c, bytes| c.qe_identity_signature = bytes,
            ),
            ("PCK list", &original.pck_crl, |c, bytes| c.pck_crl = bytes),
            ("root's list", &original.root_ca_crl, |c, bytes| {
                c.root_ca_crl = bytes;
            }),
        ];
        let piece = |name: &str, bytes: &[u8], json: Json| Piece {
            name: name.into(),
            fields: vec![Field::new("all of it", 0..bytes.len())],
            bytes: bytes.to_vec(),
            judge: Box::new(move |changed| self.verify(self.evidence.quote, &json(changed))),
        };
        let mut pieces = Vec::new();
        for (name, text, put) in texts {
            let mut marked = original.clone();
            put(&mut marked, MARK.into());
            let json = serde_json::to_vec(&marked).unwrap_or_default();
            // A changed text may be no UTF-8, so it is put into the file and not into a `String`.
            let at = find(&json, MARK.as_bytes()).unwrap_or(json.len());
            let json = move |changed: &[u8]| {
                let (before, after) = json.split_at(at);
                [before, &escaped(changed), &after[MARK.len()..]].concat()
            };
            pieces.push(piece(name, text.as_bytes(), Box::new(json)));
        }
        for (name, bytes, put) in binaries {
            let original = original.clone();
            let json = move |changed: &[u8]| {
                let mut with = original.clone();
                put(&mut with, changed.to_vec());
                serde_json::to_vec(&with).unwrap_or_default()
            };
            pieces.push(piece(name, bytes, Box::new(json)));
        }
        pieces
    }
}

type Put = fn(&mut QuoteCollateralV3, String);
type PutBytes = fn(&mut QuoteCollateralV3, Vec<u8>);
type Json = Box<dyn Fn(&[u8]) -> Vec<u8> + Sync>;

/// The inside of a JSON string (RFC 8259, 7), of bytes that may be no text.
fn escaped(bytes: &[u8]) -> Vec<u8> {
    let escape = |byte: &u8| match byte {
        b'"' | b'\\' => vec![b'\\', *byte],
        0..0x20 => format!("\\u{byte:04x}").into_bytes(),
        _ => vec![*byte],
    };
    bytes.iter().flat_map(escape).collect()
}

fn name(whose: &str, der: &[u8]) -> Result<String, String> {
    let certificate = Certificate::from_der(der).map_err(|error| error.to_string())?;
    Ok(format!("{whose}: {}", certificate.subject()))
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

/// The quote with another chain. Lengths are put right; no signature covers them.
fn with_chain(quote: &[u8], original: &Quote, chain: &[Vec<u8>]) -> Vec<u8> {
    let pem: String = chain.iter().map(|der| Certificate::pem_of(der)).collect();
    let data = original.signed_len + 4;
    let Some(at) = find(quote, BEGIN) else {
        return quote.to_vec();
    };
    let mut changed = [&quote[..at], pem.as_bytes()].concat();
    // Length of the signature data, of the QE's certification data within it, of the chain in that.
    for (length, from) in [
        (original.signed_len, data),
        (data + 64 + 64 + 2, data + 64 + 64 + 6),
        (at - 4, at),
    ] {
        let bytes = (changed.len() - from) as u32;
        changed[length..length + 4].copy_from_slice(&bytes.to_le_bytes());
    }
    changed
}

/// The fields of a quote (quote formats 4 and 5) whose form has been checked.
fn of_quote(quote: &[u8], original: &Quote) -> Vec<Field> {
    let mut at = vec![
        (0, "version"),
        (2, "attestation key type"),
        (4, "TEE type"),
        (8, "reserved, or SVNs of QE and PCE"),
        (12, "QE vendor id"),
        (28, "user data"),
    ];
    let body = match original.version {
        5 => {
            at.extend([(48, "body type"), (50, "body size")]);
            54
        }
        _ => 48,
    };
    let fields = [
        (0, "TEE_TCB_SVN"),
        (16, "MRSEAM"),
        (64, "MRSIGNERSEAM"),
        (112, "SEAMATTRIBUTES"),
        (120, "TDATTRIBUTES"),
        (128, "XFAM"),
        (136, "MRTD"),
        (184, "MRCONFIGID"),
        (232, "MROWNER"),
        (280, "MROWNERCONFIG"),
        (328, "RTMR0"),
        (376, "RTMR1"),
        (424, "RTMR2"),
        (472, "RTMR3"),
        (520, "REPORTDATA"),
        (584, "TEE_TCB_SVN_2"),
        (600, "MRSERVICETD"),
        (648, "the fields of TDX 1.5 with SERVTD_EXT"),
    ];
    let signed = original.signed_len;
    let inside = fields.iter().map(|(start, name)| (body + start, *name));
    at.extend(inside.take_while(|(start, _)| *start < signed));
    let data = signed + 4;
    let qe = data + 64 + 64 + 6;
    let authentication = qe + 384 + 64;
    let length = quote.get(authentication..authentication + 2);
    let length = length.map_or(0, |b| usize::from(u16::from_le_bytes([b[0], b[1]])));
    let chain = authentication + 2 + length;
    at.extend([
        (signed, "length of the signature data"),
        (data, "signature"),
        (data + 64, "attestation key"),
        (data + 128, "type and length of the certification data"),
        (qe, "QE report"),
        (qe + 384, "signature of the QE report"),
        (authentication, "QE authentication data"),
        (chain, "type and length of the PCK chain"),
        (chain + 6, "PCK chain, PEM"),
    ]);
    starts(&at, quote.len())
}
