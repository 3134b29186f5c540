//! The table of the API's routes: a router that, for tests, also lists its paths.

use crate::app::App;
use axum::Router;
use axum::routing::MethodRouter;
use std::sync::Arc;

/// Routes by path. `openapi.json` describes each of them, which a test checks.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    router: Router<Arc<App>>,
    #[cfg(test)]
    pub(crate) paths: Vec<&'static str>,
}

impl Routes {
    /// Adds a path with its methods.
    pub(crate) fn route(mut self, path: &'static str, methods: MethodRouter<Arc<App>>) -> Self {
        #[cfg(test)]
        self.paths.push(path);
        self.router = self.router.route(path, methods);
        self
    }

    /// Adds the routes of another table.
    pub(crate) fn merge(mut self, other: Self) -> Self {
        #[cfg(test)]
        self.paths.extend(&other.paths);
        self.router = self.router.merge(other.router);
        self
    }

    /// The router.
    pub(crate) fn into_router(self) -> Router<Arc<App>> {
        self.router
    }
}
