package main

import (
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/egret-project/egret/monitor"
)

// Who broke into the agent of a node sends whoever asks it to a service that he does not reach himself, as one on the
// loopback of crdsync's node.
func TestAnAgentSendsNobodyElsewhere(t *testing.T) {
	var visits atomic.Int64
	secret := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { visits.Add(1) }))
	defer secret.Close()
	ca, dir := newAuthority(t), t.TempDir()
	ca.write(dir, ca.pair(x509.ExtKeyUsageClientAuth, "crdsync"))
	agent := httptest.NewUnstartedServer(http.RedirectHandler(secret.URL, http.StatusFound))
	agent.TLS = &tls.Config{Certificates: []tls.Certificate{ca.pair(x509.ExtKeyUsageServerAuth, "n1")}, MinVersion: tls.VersionTLS13}
	agent.StartTLS()
	defer agent.Close()
	f := agentsFlags{port: 1, files: monitor.ClientTLS{CA: filepath.Join(dir, "ca.crt"), Cert: filepath.Join(dir, "tls.crt"), Key: filepath.Join(dir, "tls.key")}}
	client, err := f.client(nil)
	if err != nil {
		t.Fatal(err)
	}
	r, err := client.Get(agent.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusFound || visits.Load() > 0 {
		t.Errorf("status %d, and %d visits to where the agent sent: want its own answer, and none", r.StatusCode, visits.Load())
	}
}
