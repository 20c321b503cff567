package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/server/v3/embed"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/internal/syncbuf"
	"github.com/egret-project/egret/store"
)

// secured is an etcd that knows its clients by their certificates.
type secured struct {
	*testing.T
	dir string
	url string
}

func newSecured(t *testing.T) secured {
	t.Helper()
	a, s := newAuthority(t), secured{T: t, dir: t.TempDir()}
	member, key := a.issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: "member"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
	for name, pair := range map[string]tls.Certificate{
		"member": {Certificate: [][]byte{member.Raw}, PrivateKey: key}, "root": a.pair(x509.ExtKeyUsageClientAuth, "root"),
		"agent": a.pair(x509.ExtKeyUsageClientAuth, "egret-agent"), "crdsync": a.pair(x509.ExtKeyUsageClientAuth, "egret-crdsync"),
		"operator": a.pair(x509.ExtKeyUsageClientAuth, "egret-operator"), "stranger": a.pair(x509.ExtKeyUsageClientAuth, "stranger"),
	} {
		if err := os.Mkdir(filepath.Join(s.dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		a.write(filepath.Join(s.dir, name), pair)
	}
	etcd := etcdtest.New(t, func(cfg *embed.Config) {
		cfg.ListenClientUrls[0].Scheme, cfg.AdvertiseClientUrls[0].Scheme = "unixs", "https"
		cfg.ClientTLSInfo.CertFile, cfg.ClientTLSInfo.KeyFile = filepath.Join(s.dir, "member", "tls.crt"), filepath.Join(s.dir, "member", "tls.key")
		cfg.ClientTLSInfo.TrustedCAFile, cfg.ClientTLSInfo.ClientCertAuth = filepath.Join(s.dir, "member", "ca.crt"), true
	})
	s.url = "https://" + etcd.Endpoint()
	return s
}

// as returns the flags that show a certificate.
func (s secured) as(who string) []string {
	at := func(file string) string { return filepath.Join(s.dir, who, file) }
	return []string{"--endpoints", s.url, "--cacert", at("ca.crt"), "--cert", at("tls.crt"), "--key", at("tls.key")}
}

func (s secured) egret(who string, args ...string) (string, error) {
	var out bytes.Buffer
	c := root()
	c.SetArgs(append(args, s.as(who)...))
	c.SetOut(&out)
	err := c.ExecuteContext(s.Context())
	return out.String(), err
}

func (s secured) client(who string) *store.Client {
	s.Helper()
	f := etcdFlags{
		endpoints: []string{s.url}, cacert: filepath.Join(s.dir, who, "ca.crt"), cert: filepath.Join(s.dir, who, "tls.crt"), key: filepath.Join(s.dir, who, "tls.key"),
		dialTimeout: 10 * time.Second,
	}
	c, err := f.dial(s.Context(), quiet)
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { c.Close() })
	return c
}

func TestEtcdHoldsEachCertificateToItsPart(t *testing.T) {
	s := newSecured(t)
	// Printed, nothing is changed.
	for range 2 {
		out, err := s.egret("root", "etcd-rbac")
		if err != nil || !strings.Contains(out, "etcdctl role add egret-agent\n") || !strings.Contains(out, "any client may write everything") {
			t.Fatalf("%v, printed:\n%s", err, out)
		}
	}
	// Who would lock himself out gets an error, and nothing is changed.
	if _, err := s.egret("agent", "etcd-rbac", "--apply", "--enable"); err == nil || !strings.Contains(err.Error(), "--root") {
		t.Errorf("enabling as an agent: %v", err)
	}
	if out, err := s.egret("root", "etcd-rbac", "--apply", "--enable"); err != nil || !strings.HasSuffix(out, "etcdctl auth enable\n") {
		t.Fatalf("%v, printed:\n%s", err, out)
	}
	if out, err := s.egret("root", "etcd-rbac", "--apply", "--enable"); err != nil || out != "" {
		t.Errorf("once more: %v, printed:\n%s", err, out)
	}
	if _, err := s.egret("agent", "etcd-rbac", "--apply"); err == nil || !strings.Contains(err.Error(), "root") {
		t.Errorf("roles changed as an agent: %v, want an error that names who may", err)
	}

	agent := s.client("agent")
	l, err := agent.Grant(t.Context(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := agent.Claim(t.Context(), l, egress.Owner{IP: netip.MustParseAddr("10.10.0.11"), Node: "n1"}, store.Former{}); !ok || err != nil {
		t.Errorf("an agent claims: %t, %v", ok, err)
	}
	if _, err := agent.Etcd().Put(t.Context(), "/egret/allocations/10.10.0.11", "{}"); !errors.Is(err, rpctypes.ErrPermissionDenied) {
		t.Errorf("an agent writes an allocation: %v", err)
	}
	if err := agent.Cordon(t.Context(), egress.Cordon{Node: "n2"}); !errors.Is(err, rpctypes.ErrPermissionDenied) {
		t.Errorf("an agent cordons another node: %v", err)
	}
	node, err := store.Encode(egress.Node{Name: "n1", Index: 1})
	if err == nil {
		_, err = s.client("crdsync").Etcd().Put(t.Context(), "/egret/nodes/n1", string(node))
	}
	if err != nil {
		t.Fatal(err)
	}
	if out, err := s.egret("operator", "cordon", "n1"); err != nil {
		t.Errorf("an operator cordons: %v %s", err, out)
	}
	if out, err := s.egret("operator", "get", "cordons"); err != nil || !strings.Contains(out, "n1") {
		t.Errorf("an operator looks: %v %s", err, out)
	}
	// A good certificate of no user has no rights, and the error says what to do.
	if _, err := s.egret("stranger", "get", "owners"); err == nil || !strings.Contains(err.Error(), "--user") {
		t.Errorf("a stranger looks: %v", err)
	}
}

// TestADaemonSaysWhatEtcdDoesNotAllowIt: a new version may write keys that the roles of an older one do not have.
func TestADaemonSaysWhatEtcdDoesNotAllowIt(t *testing.T) {
	s := newSecured(t)
	say := func(who string, grants []store.Grant, foreign, until string) string {
		t.Helper()
		var out syncbuf.Buffer
		stop := sayRights(t.Context(), s.client(who), grants, foreign, slog.New(slog.NewTextHandler(&out, nil)))
		defer stop()
		for end := time.Now().Add(20 * time.Second); !strings.Contains(out.String(), until); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: %q is not in %q", who, until, out.String())
			}
		}
		return out.String()
	}
	say("agent", store.AgentGrants, store.IDPrefix, "any client write everything")
	if _, err := s.egret("root", "etcd-rbac", "--apply", "--enable"); err != nil {
		t.Fatal(err)
	}
	newer := append([]store.Grant{{Key: "of-a-newer-version/", Write: true}}, store.AgentGrants...)
	out := say("agent", newer, store.IDPrefix, "write /egret/of-a-newer-version/")
	if strings.Contains(out, "owners") || !strings.Contains(out, "egret etcd-rbac --apply") {
		t.Errorf("said: %s", out)
	}
	for who, grants := range map[string][]store.Grant{"agent": store.AgentGrants, "crdsync": store.CrdsyncGrants} {
		if lacks, err := s.client(who).Lacks(t.Context(), grants); err != nil || len(lacks) > 0 {
			t.Errorf("%s: %v, %v", who, lacks, err)
		}
	}
}
