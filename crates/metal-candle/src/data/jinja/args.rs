//! Parses positional and keyword arguments of Python's methods and Jinja's filters.

use super::python::invalid;
use minijinja::value::{Kwargs, Value};
use minijinja::{Error, State};

/// The arguments of one call; each is taken by position or by name.
pub(super) struct Args<'a> {
    name: &'a str,
    positional: &'a [Value],
    keywords: Option<Kwargs>,
    taken: usize,
}

impl<'a> Args<'a> {
    pub(super) fn new(name: &'a str, args: &'a [Value]) -> Result<Self, Error> {
        let (positional, keywords) = match args.split_last() {
            Some((last, rest)) if last.is_kwargs() => (rest, Some(Kwargs::try_from(last.clone())?)),
            _ => (args, None),
        };
        Ok(Self { name, positional, keywords, taken: 0 })
    }

    /// The arguments of a filter.
    pub(super) fn of(name: &'a str, positional: &'a [Value], keywords: Kwargs) -> Self {
        Self { name, positional, keywords: Some(keywords), taken: 0 }
    }

    /// The next argument; `None` if the call omits it.
    pub(super) fn next(&mut self, keyword: &'a str) -> Result<Option<Value>, Error> {
        let positional = self.positional.get(self.taken).cloned();
        self.taken += 1;
        match (&self.keywords, positional) {
            (Some(keywords), found) if !keyword.is_empty() && keywords.has(keyword) => {
                if found.is_some() {
                    return Err(self.wrong(&format!("`{keyword}` is given twice")));
                }
                keywords.get::<Value>(keyword).map(Some)
            }
            (_, found) => Ok(found),
        }
    }

    /// The next argument, which is required.
    pub(super) fn required(&mut self, keyword: &'a str) -> Result<Value, Error> {
        self.next(keyword)?.ok_or_else(|| self.wrong("an argument is missing"))
    }

    pub(super) fn text(&mut self, keyword: &'a str) -> Result<String, Error> {
        let value = self.required(keyword)?;
        value.as_str().map(str::to_string).ok_or_else(|| self.wrong("expected a string"))
    }

    /// The next argument as text; `None` if it is omitted or none.
    pub(super) fn optional_text(&mut self, keyword: &'a str) -> Result<Option<String>, Error> {
        match self.next(keyword)? {
            Some(value) if !value.is_none() => match value.as_str() {
                Some(text) => Ok(Some(text.to_string())),
                None => Err(self.wrong("expected a string")),
            },
            _ => Ok(None),
        }
    }

    /// The next argument as an integer; `None` if it is omitted or none.
    pub(super) fn optional_integer(&mut self, keyword: &'a str) -> Result<Option<i64>, Error> {
        match self.next(keyword)? {
            Some(value) if !value.is_none() => {
                let integer = i64::try_from(value).map_err(|_| self.wrong("expected an integer"))?;
                Ok(Some(integer))
            }
            _ => Ok(None),
        }
    }

    pub(super) fn integer(&mut self, keyword: &'a str, default: i64) -> Result<i64, Error> {
        Ok(self.optional_integer(keyword)?.unwrap_or(default))
    }

    pub(super) fn flag(&mut self, keyword: &'a str, default: bool) -> Result<bool, Error> {
        Ok(self.next(keyword)?.map_or(default, |value| value.is_true()))
    }

    /// Returns an error if arguments are left.
    pub(super) fn end(self) -> Result<(), Error> {
        if self.positional.len() > self.taken {
            return Err(self.wrong(&format!("expected at most {} arguments", self.taken)));
        }
        match &self.keywords {
            Some(keywords) => keywords.assert_all_used(),
            None => Ok(()),
        }
    }

    pub(super) fn wrong(&self, what: &str) -> Error {
        invalid(format!("`{}`: {what}", self.name))
    }
}

/// Charges fuel for a text of `num_bytes` before it is created.
pub(super) fn pay_bytes(state: &State, num_bytes: usize) -> Result<(), Error> {
    state.consume_fuel(num_bytes as u64 / 64)
}

/// Charges fuel for a list of `num_items` before it is created.
pub(super) fn pay_items(state: &State, num_items: usize) -> Result<(), Error> {
    state.consume_fuel(num_items as u64)
}
