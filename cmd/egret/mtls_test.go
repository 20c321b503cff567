package main

import (
	"bytes"
	"crypto/tls"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"

	"github.com/egret-project/egret/check"
	"github.com/egret-project/egret/internal/etcdtest"
)

// What etcd's client makes of endpoints and flags decides: it drops certificates where the first of several URLs is
// plain, and a loopback address is reached by all of the node.
func TestWithoutMTLSADaemonNeedsTheFlagInsecure(t *testing.T) {
	const url = "https://10.0.0.1:2379"
	for name, tt := range map[string]struct {
		flags etcdFlags
		want  string // "": by mTLS
	}{
		"certificates of both":        {etcdFlags{endpoints: []string{url}, cacert: "ca", cert: "c", key: "k"}, ""},
		"addresses, and certificates": {etcdFlags{endpoints: []string{"10.0.0.1:2379", "10.0.0.2:2379"}, cacert: "ca", cert: "c", key: "k"}, ""},
		"CAs of the system":           {etcdFlags{endpoints: []string{url}, cert: "c", key: "k"}, ""},
		"nothing":                     {etcdFlags{endpoints: []string{"127.0.0.1:2379"}}, "127.0.0.1:2379 without TLS"},
		"a loopback":                  {etcdFlags{endpoints: []string{"http://[::1]:2379"}}, "http://[::1]:2379 without TLS"},
		"a socket":                    {etcdFlags{endpoints: []string{"unix:///run/etcd"}, cert: "c", key: "k"}, "unix:///run/etcd without TLS"},
		"certificates for a plain etcd": {
			etcdFlags{endpoints: []string{"http://10.0.0.1:2379"}, cacert: "ca", cert: "c", key: "k"}, "http://10.0.0.1:2379 without TLS",
		},
		"a plain one among others": {
			etcdFlags{endpoints: []string{url, "http://10.0.0.2:2379"}, cacert: "ca", cert: "c", key: "k"}, "http://10.0.0.2:2379 without TLS",
		},
		"a scheme in capitals":          {etcdFlags{endpoints: []string{"HTTP://10.0.0.1:2379"}, cert: "c", key: "k"}, "HTTP://10.0.0.1:2379 without TLS"},
		"another's certificate":         {etcdFlags{endpoints: []string{url}, cert: "c", key: "k", insecureSkipVerify: true}, "--insecure-skip-tls-verify"},
		"TLS alone":                     {etcdFlags{endpoints: []string{url}, cacert: "ca"}, "without a client certificate"},
		"a password for a certificate":  {etcdFlags{endpoints: []string{url}, cacert: "ca", user: "root:x"}, "without a client certificate"},
		"a name of the server, no more": {etcdFlags{endpoints: []string{"10.0.0.1:2379"}, serverName: "etcd"}, "without a client certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			f := tt.flags
			if got := f.exposed(); (tt.want == "") != (got == "") || !strings.Contains(got, tt.want) {
				t.Errorf("exposed is %q, want %q", got, tt.want)
			}
			if err := f.secured(); (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), "--insecure for a trial") {
				t.Errorf("refused with %v", err)
			}
			f.insecure = true
			if err := f.secured(); err != nil {
				t.Errorf("with --insecure: %v", err)
			}
			var out bytes.Buffer
			f.warn(slog.New(slog.NewTextHandler(&out, nil)))
			if (out.Len() == 0) != (tt.want == "") || out.Len() > 0 && !strings.Contains(out.String(), "level=WARN") {
				t.Errorf("at the start it logs %q", out.String())
			}
		})
	}
}

// A daemon that shows a certificate does not know whether etcd asks others for theirs.
func TestCheckReportsWhetherEtcdAnswersWithoutACertificate(t *testing.T) {
	s := newSecured(t)
	at := func(file string) string { return filepath.Join(s.dir, "agent", file) }
	flags := func(url string) *etcdFlags {
		return &etcdFlags{endpoints: []string{url}, cacert: at("ca.crt"), cert: at("tls.crt"), key: at("tls.key"), dialTimeout: 10 * time.Second}
	}
	open := etcdtest.New(t, func(cfg *embed.Config) {
		cfg.ListenClientUrls[0].Scheme, cfg.AdvertiseClientUrls[0].Scheme = "unixs", "https"
		cfg.ClientTLSInfo.CertFile, cfg.ClientTLSInfo.KeyFile = filepath.Join(s.dir, "member", "tls.crt"), filepath.Join(s.dir, "member", "tls.key")
	})
	plain := etcdtest.New(t)
	for name, tt := range map[string]struct {
		flags *etcdFlags
		level check.Level
		want  string
	}{
		"etcd asks for certificates":       {flags(s.url), check.OK, "hears nobody who shows none"},
		"etcd asks for none":               {flags("https://" + open.Endpoint()), check.Warning, "hears who shows no certificate"},
		"one of two does not answer":       {&etcdFlags{endpoints: []string{"https://127.0.0.1:1", s.url}, cacert: at("ca.crt"), cert: at("tls.crt"), key: at("tls.key"), dialTimeout: 10 * time.Second}, check.OK, "hears nobody who shows none"},
		"nobody answers":                   {flags("https://127.0.0.1:1"), check.OK, "it is not known"},
		"a plain etcd":                     {&etcdFlags{endpoints: []string{plain.Endpoint()}}, check.Warning, "without TLS"},
		"TLS is said, and etcd is a plain": {flags("https://" + plain.Endpoint()), check.OK, "it is not known"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := tt.flags.check(t.Context(), true); got.Level != tt.level || !strings.Contains(got.Found, tt.want) || (got.Level == check.OK) != (got.Consequence == "") {
				t.Errorf("found %+v, want %s and %q", got, tt.level, tt.want)
			}
		})
	}
	if got := (&etcdFlags{}).check(t.Context(), false); got.Level != check.OK || !strings.Contains(got.Found, "--endpoints") {
		t.Errorf("without --endpoints: %+v", got)
	}
	// TLS 1.2 refuses within the handshake.
	cfg, err := flags(s.url).tls()
	if err != nil {
		t.Fatal(err)
	}
	cfg.Certificates, cfg.MaxVersion = nil, tls.VersionTLS12
	if heard, err := hears(t.Context(), strings.TrimPrefix(s.url, "https://"), cfg); heard || err != nil {
		t.Errorf("by TLS 1.2: %t, %v", heard, err)
	}
}

// A password that was read on its way is known for good.
func TestAPasswordIsNotSentInTheClear(t *testing.T) {
	t.Setenv("ETCDCTL_PASSWORD", "secret")
	server := etcdtest.New(t)
	_, err := run(t, "get", "owners", "--endpoints", server.Endpoint(), "--user", "root")
	if err == nil || !strings.Contains(err.Error(), "in the clear") || strings.Contains(err.Error(), "secret") {
		t.Errorf("error %v: want one that says that the password would be in the clear, and does not say it", err)
	}
	// this etcd has no users, and asks for no password
	if _, err := run(t, "get", "owners", "--endpoints", server.Endpoint(), "--user", "root", "--insecure"); err != nil {
		t.Errorf("with --insecure: %v", err)
	}
	if _, err := run(t, "get", "owners", "--endpoints", server.Endpoint()); err != nil {
		t.Errorf("without a user: %v", err)
	}
}
