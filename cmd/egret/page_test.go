package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/rest"

	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/internal/port"
	"github.com/egret-project/egret/internal/syncbuf"
	"github.com/egret-project/egret/monitor"
	"github.com/egret-project/egret/store"
)

// status asks until somebody answers, and returns the status; 0: nobody did.
func status(t *testing.T, client *http.Client, url, token string) int {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		r, err := http.NewRequestWithContext(t.Context(), "GET", url, nil)
		if err != nil {
			t.Fatal(err)
		}
		if token != "" {
			r.Header.Set("Authorization", "Bearer "+token)
		}
		a, err := client.Do(r)
		if err == nil {
			_, _ = io.Copy(io.Discard, a.Body) // what it is does not matter
			_ = a.Body.Close()                 // it was read
			return a.StatusCode
		}
		if !strings.Contains(err.Error(), "connection refused") || time.Now().After(end) {
			return 0
		}
	}
}

func TestThePageIsServedUntilItIsInterrupted(t *testing.T) {
	etcd, address := etcdtest.New(t).Endpoint(), fmt.Sprintf("127.0.0.1:%d", port.Hold(t))
	ctx, stop := context.WithCancel(t.Context())
	var out syncbuf.Buffer
	done := make(chan error, 1)
	go func() {
		c := root()
		c.SetArgs([]string{"page", "--endpoints", etcd, "--address", address})
		c.SetOut(&out)
		done <- c.ExecuteContext(ctx)
	}()
	if got := status(t, http.DefaultClient, "http://"+address+"/state", ""); got != 200 {
		t.Errorf("status %d", got)
	}
	stop()
	if err := <-done; err != nil || out.String() != "http://"+address+"/\n" {
		t.Errorf("it printed %q, and ended with %v", out.String(), err)
	}
}

func TestCrdsyncsPageIsForWhoProvesWhoHeIs(t *testing.T) {
	client, err := store.Dial(t.Context(), store.Config{Endpoints: []string{etcdtest.New(t).Endpoint()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	a, other, dir := newAuthority(t), newAuthority(t), t.TempDir()
	a.write(dir, a.pair(x509.ExtKeyUsageServerAuth, "page"))
	f := pageFlags{
		remote: fmt.Sprintf("127.0.0.1:%d", port.Hold(t)), clients: []string{"ann"},
		files: monitor.TLS{
			Cert: filepath.Join(dir, "tls.crt"), Key: filepath.Join(dir, "tls.key"), ClientCA: filepath.Join(dir, "ca.crt"), Options: "page", Anonymous: true,
		},
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		f.serve(ctx, client, &rest.Config{Host: "https://127.0.0.1:1"}, slog.New(slog.DiscardHandler)) // no API server
	}()
	t.Cleanup(func() { stop(); <-done })
	trusted := x509.NewCertPool()
	trusted.AddCert(a.cert)
	for name, tt := range map[string]struct {
		shows []tls.Certificate
		token string
		want  int
	}{
		"nobody":                            {nil, "", 401},
		"a client that is named":            {[]tls.Certificate{a.pair(x509.ExtKeyUsageClientAuth, "ann")}, "", 200},
		"another client":                    {[]tls.Certificate{a.pair(x509.ExtKeyUsageClientAuth, "bob")}, "", 403},
		"the name by another CA":            {[]tls.Certificate{other.pair(x509.ExtKeyUsageClientAuth, "ann")}, "", 0},
		"a server's certificate":            {[]tls.Certificate{a.pair(x509.ExtKeyUsageServerAuth, "ann")}, "", 0},
		"a token while nobody can say more": {nil, "token", 503},
	} {
		t.Run(name, func(t *testing.T) {
			transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: trusted, GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				if len(tt.shows) == 0 {
					return &tls.Certificate{}, nil
				}
				return &tt.shows[0], nil // whatever the server asks for
			}}}
			defer transport.CloseIdleConnections()
			if got := status(t, &http.Client{Transport: transport}, "https://"+f.remote+"/state", tt.token); got != tt.want {
				t.Errorf("status %d, want %d", got, tt.want)
			}
		})
	}
	if got := status(t, http.DefaultClient, "http://"+f.remote+"/state", ""); got != 400 {
		t.Errorf("without TLS: status %d, want 400, which is not the page's", got)
	}
}
