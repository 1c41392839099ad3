//! The designs to compare.

pub mod enums;
pub mod fleet;
pub mod form;
pub mod model;
pub mod registry;
pub mod retpoline;

/// The forms over back ends whose operation may be inlined.
pub mod inlined {
    mod bodies {
        pub(super) use crate::designs::enums::{
            InlinedAmd as Amd, InlinedChain as Chain, InlinedChainRest as ChainRest,
            InlinedFlat as Flat, InlinedIntel as Intel, InlinedNested as Nested, InlinedOne as One,
        };
        pub(super) use crate::designs::model::inlined::{SevVm, SvmVm, TdxVm, VmxVm};
    }
    include!("forms.rs");
}

/// The forms over back ends whose operation is a separate function.
pub mod called {
    mod bodies {
        pub(super) use crate::designs::enums::{
            CalledAmd as Amd, CalledChain as Chain, CalledChainRest as ChainRest,
            CalledFlat as Flat, CalledIntel as Intel, CalledNested as Nested, CalledOne as One,
        };
        pub(super) use crate::designs::model::called::{SevVm, SvmVm, TdxVm, VmxVm};
    }
    include!("forms.rs");
}
