package manifests

// For the tests that need an API server: their helper imports this package.
var Renderer = renderer
