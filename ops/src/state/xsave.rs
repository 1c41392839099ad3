//! x87, SSE and extended state.

use alloc::boxed::Box;
use alloc::vec;

use crate::{Error, Field, Result};

/// The length of the legacy region and the header, which every XSAVE area has (SDM vol. 1, 13.4).
const LEAST: usize = 576;

/// An XSAVE area in the standard format (`struct kvm_xsave`; SDM vol. 1, 13.4). Bytes 0 to 511 are
/// the legacy region (the layout of FXSAVE), bytes 512 to 575 the header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Xsave(Box<[u8]>);

impl Xsave {
    /// Takes an area as it is.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an area of less than 576 bytes.
    pub fn new(area: Box<[u8]>) -> Result<Self> {
        if area.len() < LEAST {
            return Err(Error::Invalid(Field::BufferLength, area.len() as u64));
        }
        Ok(Self(area))
    }

    /// The initial state of x87 and SSE in an area of the length that `KVM_GET_XSAVE` uses, 4096
    /// bytes: FCW is 0x37f and MXCSR is 0x1f80.
    pub fn initial() -> Self {
        let mut area = vec![0; 4096];
        area[..2].copy_from_slice(&0x37fu16.to_le_bytes());
        area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        Self(area.into())
    }

    /// The area.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The area, to change.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }

    /// XSTATE_BV: the components that the area holds. The other ones are in their initial state.
    ///
    /// ```
    /// assert_eq!(kvm_ops_core::Xsave::initial().components(), 0);
    /// ```
    pub fn components(&self) -> u64 {
        let mut word = [0; 8];
        word.copy_from_slice(&self.0[512..520]);
        u64::from_le_bytes(word)
    }
}
