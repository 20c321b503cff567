package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"slices"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// trust is what etcd does not read again while it runs: the CAs whose certificates it takes.
type trust struct {
	m     *member
	cfg   *embed.Config
	read  []byte // what --certs had when etcd started
	looks int    // since it has something else
	turns int    // looks in a row at which it was this member's turn
}

// look reports whether this member is to end, for its pod to start it with the CAs that --certs has by now. It was its
// turn a look before, too, so that who ended last has had that long to catch up.
func (t *trust) look(ctx context.Context) bool {
	now, err := os.ReadFile(t.cfg.PeerTLSInfo.TrustedCAFile)
	if err != nil || bytes.Equal(now, t.read) {
		t.looks, t.turns = 0, 0
		return false
	}
	if err = t.m.turn(ctx, t.cfg, now); err == nil {
		t.turns++
	} else {
		t.turns = 0
	}
	if t.looks%60 == 0 { // each hour
		t.cfg.GetLogger().Warn("the CAs changed, and etcd reads them when it starts: this member ends in its turn, when all serve",
			zap.String("file", t.cfg.PeerTLSInfo.TrustedCAFile), zap.NamedError("waiting", err))
	}
	t.looks++
	return t.turns == 2
}

// turn returns nil where this member is the next one to end: all others serve, and those before it, by their names, go
// by these CAs already. So no two are away at a time.
func (m *member) turn(ctx context.Context, cfg *embed.Config, cas []byte) error {
	want, err := subjects(cas)
	if err != nil {
		return fmt.Errorf("%s: %w", cfg.PeerTLSInfo.TrustedCAFile, err)
	}
	urls, err := m.urls()
	if err != nil {
		return err
	}
	answers, _, err := m.ask(ctx, cfg)
	if err != nil {
		return err
	}
	before := true
	for _, name := range slices.Sorted(maps.Keys(urls)) {
		if name == m.name {
			before = false
			continue
		}
		if !slices.ContainsFunc(answers, func(a answer) bool { return a.from == urls[name] }) {
			return fmt.Errorf("%s does not serve", name)
		}
		if !before {
			continue
		}
		has, err := trusted(ctx, cfg, urls[name])
		if err != nil {
			return fmt.Errorf("asking %s for its CAs: %w", name, err)
		}
		if !slices.EqualFunc(has, want, bytes.Equal) {
			return fmt.Errorf("%s is before it", name)
		}
	}
	return nil
}

// trusted returns the names of the CAs that a member goes by, sorted: a server tells them to who is to show a
// certificate.
func trusted(ctx context.Context, cfg *embed.Config, at string) (names [][]byte, err error) {
	c, err := cfg.PeerTLSInfo.ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("reading --certs: %w", err)
	}
	show := c.GetClientCertificate
	c.GetClientCertificate = func(r *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		names = slices.SortedFunc(slices.Values(r.AcceptableCAs), bytes.Compare)
		return show(r)
	}
	u, err := url.Parse(at)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	conn, err := (&tls.Dialer{Config: c}).DialContext(ctx, "tcp", u.Host)
	if err != nil {
		return nil, err
	}
	return names, conn.Close()
}

// subjects returns the names of the CAs of a PEM file, sorted.
func subjects(file []byte) (names [][]byte, err error) {
	for {
		var b *pem.Block
		if b, file = pem.Decode(file); b == nil {
			break
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, err
		}
		names = append(names, c.RawSubject)
	}
	if len(names) == 0 {
		return nil, errors.New("it has no certificate")
	}
	slices.SortFunc(names, bytes.Compare)
	return names, nil
}
