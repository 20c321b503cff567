package aws

import (
	"crypto/x509"
	"sync"

	"golang.org/x/crypto/x509roots/fallback/bundle"
)

// trustRoots has this process trust Mozilla's CAs, as of the version in go.mod, where the system names none: the image
// has no file of CAs. It is done by New, and not by importing .../x509roots/fallback: agents and crdsync, which speak to
// nobody whom a public CA knows, go on to trust none.
var trustRoots = sync.OnceFunc(func() {
	pool := x509.NewCertPool()
	for root := range bundle.Roots() {
		c, err := x509.ParseCertificate(root.Certificate)
		switch {
		case err != nil: // this Go does not read it, and would trust nothing that it signs
		case root.Constraint != nil:
			pool.AddCertWithConstraint(c, root.Constraint)
		default:
			pool.AddCert(c)
		}
	}
	x509.SetFallbackRoots(pool)
})
