package admission

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/egret-project/egret/monitor"
)

const (
	// reloadAfter is for how long the file of the CAs is not read again: a handshake is anybody's to begin.
	reloadAfter = 10 * time.Second
	// tellInterval bounds the log of those who ask and may not.
	tellInterval = 5 * time.Minute
)

// clients are those who may ask.
type clients struct {
	file  string
	names []string
	log   *slog.Logger
	mu    sync.Mutex // guards the rest
	cas   *x509.CertPool
	read  time.Time
	told  time.Time
}

func newClients(file string, names []string, log *slog.Logger) *clients {
	return &clients{file: file, names: names, log: log}
}

func (c *clients) validate() error {
	if c.file == "" && len(c.names) == 0 {
		return nil
	}
	if c.file == "" || len(c.names) == 0 {
		return errors.New("--webhook-clients and --webhook-client-ca-file belong together: only one of them is given")
	}
	var errs []error
	for _, name := range c.names {
		if strings.TrimSpace(name) == "" {
			errs = append(errs, errors.New("--webhook-clients: want common names of client certificates, none of them empty"))
		}
	}
	_, err := monitor.ReadCAs("--webhook-client-ca-file", c.file)
	return errors.Join(append(errs, err)...)
}

// config returns what a server shakes hands with: base, and where there are names, who they are of.
func (c *clients) config(base *tls.Config) *tls.Config {
	if len(c.names) == 0 {
		return base
	}
	out := base.Clone()
	out.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		cas, err := c.pool()
		if err != nil {
			return nil, err
		}
		cfg := base.Clone()
		cfg.SessionTicketsDisabled = true // a session would outlive the CA that it was opened by
		// Without a certificate, or with one of another CA, the client gets as far as our own look, which can tell of
		// it.
		cfg.ClientAuth = tls.RequestClientCert
		cfg.VerifyConnection = func(state tls.ConnectionState) error {
			err := c.allowed(state.PeerCertificates, cas)
			if err != nil {
				c.tell(hello.Conn, err)
			}
			return err
		}
		return cfg, nil
	}
	return out
}

// allowed returns why a client is not answered that showed these certificates.
func (c *clients) allowed(shown []*x509.Certificate, cas *x509.CertPool) error {
	if len(shown) == 0 {
		return errors.New("the client shows no certificate")
	}
	between := x509.NewCertPool()
	for _, cert := range shown[1:] {
		between.AddCert(cert)
	}
	o := x509.VerifyOptions{Roots: cas, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	if _, err := shown[0].Verify(o); err != nil {
		return fmt.Errorf("the client's certificate: %w", err)
	}
	if name := shown[0].Subject.CommonName; !slices.Contains(c.names, name) {
		return fmt.Errorf("the client's certificate is of %q: want one of --webhook-clients %q", name, c.names)
	}
	return nil
}

// pool returns the CAs. A file that cannot be read leaves what it held before.
func (c *clients) pool() (*x509.CertPool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.read) < reloadAfter {
		if c.cas == nil {
			return nil, errors.New("no CA of clients")
		}
		return c.cas, nil
	}
	c.read = time.Now()
	cas, err := monitor.ReadCAs("--webhook-client-ca-file", c.file)
	switch {
	case err == nil:
		c.cas = cas
	case c.cas == nil:
		c.log.Warn("the webhook answers nobody", "err", err)
		return nil, err
	default:
		c.log.Warn("the webhook's clients stay as they were", "err", err)
	}
	return c.cas, nil
}

// tell logs who is not answered, one in tellInterval: that is an API server which was not told to show a certificate,
// or somebody who should not ask.
func (c *clients) tell(conn net.Conn, err error) {
	c.mu.Lock()
	now := time.Now()
	due := now.Sub(c.told) >= tellInterval
	if due {
		c.told = now
	}
	c.mu.Unlock()
	if due {
		c.log.Warn("the webhook does not answer a client; where that is an API server, give it a certificate (docs/security.md)",
			"address", conn.RemoteAddr().String(), "err", err)
	}
}
