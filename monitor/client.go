package monitor

import (
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"sync"
)

// ClientTLS are the files by which servers for others (Config.Remote) are asked. They are read again for each
// connection, so that certificates, and the CAs that servers are checked by, can be replaced while a daemon runs.
type ClientTLS struct {
	CA        string // the CAs of the servers' certificates, in PEM
	Cert, Key string // of this client, in PEM
	// ServerName is the DNS name that a server's certificate has to be for; empty: the host that is asked.
	ServerName string
	// Options is what the options are called that name the files, for errors: "agents" of --agents-ca-file and so on.
	Options string
	Log     *slog.Logger // of files that can no longer be read; nil: none
}

// load reads the files.
func (t ClientTLS) load() (*tls.Config, error) {
	of := "--" + cmp.Or(t.Options, "metrics")
	pair, err := tls.LoadX509KeyPair(t.Cert, t.Key)
	if err != nil {
		return nil, fmt.Errorf("reading %s-cert-file and %s-key-file: %w", of, of, err)
	}
	roots, err := ReadCAs(of+"-ca-file", t.CA)
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13, RootCAs: roots, ServerName: t.ServerName,
		// Shown to whoever asks: of Certificates it would be left out where the server names other CAs, as one does
		// that has the next CA already.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil },
	}, nil
}

// Dial returns what opens a connection of TLS, by the files as they are then. Files that cannot be read, as while they
// are replaced, leave what they held before. An error: they cannot be read now.
func (t ClientTLS) Dial() (func(ctx context.Context, network, address string) (net.Conn, error), error) {
	last, err := t.load()
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex // guards last and said
	said := ""
	current := func() *tls.Config {
		next, err := t.load()
		mu.Lock()
		defer mu.Unlock()
		switch {
		case err == nil:
			last, said = next, ""
		case said != err.Error():
			said = err.Error()
			if t.Log != nil {
				t.Log.Warn("certificates stay as they were", "options", cmp.Or(t.Options, "metrics"), "err", err)
			}
		}
		return last
	}
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		return (&tls.Dialer{Config: current()}).DialContext(ctx, network, address)
	}, nil
}
