package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/check"
)

// wantsTLS reports whether a flag or an endpoint asks for TLS.
func (f *etcdFlags) wantsTLS() bool {
	return f.cacert != "" || f.cert != "" || f.key != "" || f.insecureSkipVerify || f.serverName != "" ||
		slices.ContainsFunc(f.endpoints, func(e string) bool { return strings.HasPrefix(e, "https://") })
}

// plain returns the first endpoint that is spoken to without TLS, or nothing. What etcd's client goes by is the scheme,
// also where flags name a certificate, and of several endpoints that of the first: so one that is not https is enough.
// Without a scheme the flags count.
func (f *etcdFlags) plain() string {
	for _, e := range f.endpoints {
		if scheme, _, ok := strings.Cut(e, "://"); ok && scheme != "https" || !ok && !f.wantsTLS() {
			return e
		}
	}
	return ""
}

// exposed says why etcd is not spoken to by mTLS; empty: it is. A loopback address is no exception: all processes of
// the node reach it, those in hostNetwork pods that have no rights there included.
func (f *etcdFlags) exposed() string {
	if plain := f.plain(); plain != "" {
		return plain + " without TLS"
	}
	if f.insecureSkipVerify {
		return "without a look at etcd's certificate (--insecure-skip-tls-verify)"
	}
	if f.cert == "" {
		return "without a client certificate (--cert, --key)"
	}
	return ""
}

// exposure is what comes of it.
const exposure = "who reaches etcd, or is on the way to it, gives egress IPs to any node"

// secured refuses a connection to etcd without mTLS, unless --insecure allows it. It is for what runs for good: a
// command of an operator does one thing for somebody who named the etcd, like etcdctl.
func (f *etcdFlags) secured() error {
	if e := f.exposed(); e != "" && !f.insecure {
		return fmt.Errorf("etcd would be spoken to %s, and %s: give https URLs, --cacert, --cert and --key, or --insecure for a trial", e, exposure)
	}
	return nil
}

// warn says at the start of a daemon what --insecure allowed.
func (f *etcdFlags) warn(log *slog.Logger) {
	if e := f.exposed(); e != "" {
		log.Warn("etcd is not spoken to by mTLS, as --insecure allows", "found", e, "consequence", exposure)
	}
}

// check reports whether the flags make mTLS, and whether etcd answers clients that show no certificate. Without asked
// nothing is tried.
func (f *etcdFlags) check(ctx context.Context, asked bool) check.Finding {
	out := check.Finding{Check: "etcd-mtls", Level: check.OK, For: "nobody else says who has which egress IP", Found: "not asked: --endpoints says where etcd is"}
	if !asked {
		return out
	}
	if e := f.exposed(); e != "" {
		out.Level, out.Found, out.Consequence = check.Warning, "no: "+e, exposure+"; agent and crdsync start so with --insecure alone"
		return out
	}
	open, err := f.takesStrangers(ctx)
	switch {
	case err != nil:
		out.Found = fmt.Sprintf("certificates of both; it is not known whether etcd hears who shows none: %v", err)
	case open:
		out.Level, out.Found = check.Warning, "etcd hears who shows no certificate"
		out.Consequence = "who reaches etcd gives egress IPs to any node, unless etcd has users (egret etcd-rbac): start etcd with --client-cert-auth and --trusted-ca-file"
	default:
		out.Found = "certificates of both; etcd hears nobody who shows none"
	}
	return out
}

// takesStrangers tries whether etcd hears a client that shows no certificate. By TLS 1.3 that one learns it from the
// answer to what it says first.
func (f *etcdFlags) takesStrangers(ctx context.Context) (bool, error) {
	cfg, err := f.tls()
	if err != nil {
		return false, err
	}
	cfg.Certificates = nil
	ctx, cancel := context.WithTimeout(ctx, f.dialTimeout)
	defer cancel()
	var errs []error
	for _, e := range f.endpoints {
		open, err := hears(ctx, hostPort(e), cfg)
		if err == nil {
			return open, nil
		}
		errs = append(errs, err)
	}
	return false, errors.Join(errs...)
}

// hears reports whether an HTTP server answers a client. A refusal is an alert of TLS; after the handshake also the end
// of the connection without a byte of an answer: a server that closes with the client's words unread resets the
// connection, and the alert may go down with it.
func hears(ctx context.Context, host string, cfg *tls.Config) (bool, error) {
	conn, err := (&tls.Dialer{Config: cfg}).DialContext(ctx, "tcp", host)
	if err != nil {
		return false, refusal(err)
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return false, err
	}
	if _, err = io.WriteString(conn, "GET /version HTTP/1.0\r\n\r\n"); err == nil {
		_, err = conn.Read(make([]byte, 1))
	}
	if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) {
		return false, nil
	}
	return err == nil, refusal(err)
}

// refusal returns nil for an error that is an alert of the other side, as crypto/tls names it.
func refusal(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "remote error" {
		return nil
	}
	return err
}
