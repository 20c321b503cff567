package manifests

import "embed"

// FS holds crds/*.yaml, the CRDs; deploy/*.yaml, everything that runs in a cluster; and examples/*.yaml.
//
//go:embed crds/*.yaml deploy/*.yaml examples/*.yaml
var FS embed.FS
