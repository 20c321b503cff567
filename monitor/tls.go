package monitor

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"
)

// TLS are the files of the listener for others. They are read again while it runs, so that certificates can be
// replaced.
type TLS struct {
	Cert, Key string // of this server, in PEM
	ClientCA  string // the CAs of the certificates that clients have to show, in PEM
	// Options is what the options are called that name the files, for errors; empty: "metrics", of --metrics-cert-file
	// and so on.
	Options string
	// Anonymous lets in clients without a certificate, of whom the handler has to find out who they are. ClientCA may
	// be empty then.
	Anonymous bool
}

// reloadAfter is for how long files are not read again: a handshake is anybody's to begin.
const reloadAfter = 10 * time.Second

// load reads the files.
func (t TLS) load() (*tls.Config, error) {
	of := "--" + cmp.Or(t.Options, "metrics")
	if t.Cert == "" || t.Key == "" || t.ClientCA == "" && !t.Anonymous {
		files := of + "-cert-file and " + of + "-key-file too"
		if !t.Anonymous {
			files = fmt.Sprintf("%s-cert-file, %s-key-file and %s-client-ca-file too: "+
				"what leaves the node is for those alone who show a certificate of that CA", of, of, of)
		}
		return nil, fmt.Errorf("%s-address: want %s", of, files)
	}
	pair, err := tls.LoadX509KeyPair(t.Cert, t.Key)
	if err != nil {
		return nil, fmt.Errorf("reading %s-cert-file and %s-key-file: %w", of, of, err)
	}
	c := &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert,
		SessionTicketsDisabled: true, // a session would outlive the CA that it was opened by
	}
	if t.Anonymous {
		c.ClientAuth = tls.VerifyClientCertIfGiven
	}
	if t.ClientCA == "" {
		c.ClientAuth = tls.NoClientCert
		return c, nil
	}
	c.ClientCAs, err = ReadCAs(of+"-client-ca-file", t.ClientCA)
	return c, err
}

// Validate returns what is wrong with the files.
func (t TLS) Validate() error {
	_, err := t.load()
	return err
}

// ReadCAs reads a file of CA certificates that an option names.
func ReadCAs(option, file string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", option, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("reading %s %s: it holds no PEM certificate", option, file)
	}
	return pool, nil
}

// certificates are what the files held when they were last read.
type certificates struct {
	files TLS
	log   *slog.Logger
	mu    sync.Mutex // guards the rest
	last  *tls.Config
	at    time.Time
}

func (c *certificates) listener(l net.Listener) net.Listener {
	return tls.NewListener(l, &tls.Config{
		MinVersion:         tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return c.config() },
	})
}

// config returns what to shake hands with. Files that cannot be read leave what they held before.
func (c *certificates) config() (*tls.Config, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.at.IsZero() && time.Since(c.at) < reloadAfter {
		if c.last == nil {
			return nil, errors.New("no certificate")
		}
		return c.last, nil
	}
	c.at = time.Now()
	next, err := c.files.load()
	switch {
	case err == nil:
		c.last = next
	case c.last == nil:
		c.log.Warn("nothing is served to others", "options", cmp.Or(c.files.Options, "metrics"), "err", err)
		return nil, err
	default:
		c.log.Warn("certificates stay as they were", "options", cmp.Or(c.files.Options, "metrics"), "err", err)
	}
	return c.last, nil
}
