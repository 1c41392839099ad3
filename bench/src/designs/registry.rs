//! All forms by name, for tools that iterate over them.

use std::hint::black_box;

use serde::{Deserialize, Serialize};

use crate::designs::fleet::{Fleet, VMS};
use crate::designs::form::{Empty, Form, Outlined, PLACEMENTS, counted_loop, fleet};
use crate::designs::{called, inlined};

/// The kind of the operation's body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Body {
    /// The compiler may inline it.
    Inlined,
    /// It is a separate function, called from the arms of the dispatch.
    Called,
    /// It is part of the dispatch function, which every call site shares.
    Outlined,
}

impl Body {
    /// The name in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Inlined => "inlined",
            Self::Called => "called",
            Self::Outlined => "outlined",
        }
    }
}

/// One form over one kind of body.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The form's name in figures.
    pub form: &'static str,
    /// The body's kind.
    pub body: Body,
    /// The number of technologies that it supports.
    pub techs: usize,
    /// Builds a fleet that is ready to run.
    pub build: fn(&[u8; VMS]) -> Run,
}

impl Entry {
    /// The compositions that it supports.
    pub fn fleets(&self) -> impl Iterator<Item = Fleet> + use<> {
        let techs = self.techs;
        Fleet::ALL
            .into_iter()
            .filter(move |fleet| fleet.needs() <= techs)
    }
}

/// Runs a fleet of one form, given the placement of the loop and the order of visits.
pub type Run = Box<dyn Fn(usize, &[u8]) -> u64>;

type Loop<F> = fn(&[<F as Form>::Vm; VMS], &[u8]) -> u64;

fn build<F: Form>(techs: &[u8; VMS]) -> Run
where
    F::Vm: 'static,
{
    let vms = fleet::<F>(techs);
    let loops: [Loop<F>; PLACEMENTS] = [
        counted_loop::<F, 0>,
        counted_loop::<F, 1>,
        counted_loop::<F, 2>,
        counted_loop::<F, 3>,
    ];
    Box::new(move |placement, order| loops[placement](black_box(&vms), black_box(order)))
}

macro_rules! forms {
    (
        $($name:literal, $techs:literal, $Form:ident $(<$retpoline:literal>)?;)+
        outlined: $($outlined:literal, $outlined_techs:literal, $OutlinedForm:ident;)+
    ) => {
        /// The empty loop, then every form with each kind of body. A form with a pointer always
        /// calls its body, so its `Inlined` and `Called` rows differ by noise only, and it has no
        /// outlined row.
        pub const FORMS: &[Entry] = &[
            Entry { form: "empty", body: Body::Inlined, techs: 1, build: build::<Empty> },
            $(
                Entry {
                    form: $name, body: Body::Inlined, techs: $techs,
                    build: build::<inlined::$Form $(<$retpoline>)?>,
                },
                Entry {
                    form: $name, body: Body::Called, techs: $techs,
                    build: build::<called::$Form $(<$retpoline>)?>,
                },
            )+
            $(
                Entry {
                    form: $outlined, body: Body::Outlined, techs: $outlined_techs,
                    build: build::<Outlined<inlined::$OutlinedForm>>,
                },
            )+
        ];
    };
}

forms! {
    "direct", 1, Direct;
    "enum1", 1, Enum1;
    "enum2", 2, Enum2;
    "enum4", 4, Enum4;
    "enum4_sparse", 4, EnumSparse;
    "enum_chain", 4, EnumChain;
    "enum2x2", 4, Enum2x2;
    "enum2x2_boxed", 4, Enum2x2Boxed;
    "box_dyn", 4, BoxDyn;
    "per_vm_table", 4, PerVmTable<false>;
    "tag_table", 4, TagTable<false>;
    "main_c_static_call", 2, MainCStatic;
    "main_c", 2, MainC<false>;
    "layer", 4, Layer<false>;
    "per_vm_table_retpoline", 4, PerVmTable<true>;
    "tag_table_retpoline", 4, TagTable<true>;
    "main_c_retpoline", 2, MainC<true>;
    "layer_retpoline", 4, Layer<true>;
    outlined:
    "direct", 1, Direct;
    "enum1", 1, Enum1;
    "enum2", 2, Enum2;
    "enum4", 4, Enum4;
    "enum4_sparse", 4, EnumSparse;
    "enum_chain", 4, EnumChain;
    "enum2x2", 4, Enum2x2;
}
