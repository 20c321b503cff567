package main

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// The chart says nothing of where a member listens.
func TestAMemberListensAtAllAddressesUnlessToldOtherwise(t *testing.T) {
	certs := t.TempDir()
	for _, file := range []string{"ca.crt", "tls.crt", "tls.key"} {
		if err := os.WriteFile(filepath.Join(certs, file), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct{ host, listen, want string }{
		{"10.0.0.1", "", "0.0.0.0:8483"},
		{"fd00::1", "", "[::]:8483"},
		{"10.0.0.1", "10.0.0.1", "10.0.0.1:8483"},
	} {
		m := member{
			name: "a", dataDir: t.TempDir(), initialCluster: "a=https://a.peers.egret-system.svc:8484", token: "t", hostIP: tt.host, listenIP: tt.listen,
			clientPort: 8483, peerPort: 8484, certs: certs, quota: 512 << 20, compactAfter: time.Hour,
		}
		cfg, err := m.config()
		if err != nil {
			t.Errorf("%s, listening at %q: %v", tt.host, tt.listen, err)
			continue
		}
		if got := cfg.ListenClientUrls[0].Host; got != tt.want {
			t.Errorf("%s, listening at %q: clients are served at %s, want %s", tt.host, tt.listen, got, tt.want)
		}
		if mode, keeps := cfg.AutoCompactionMode, cfg.AutoCompactionRetention; mode != "periodic" || keeps != "1h0m0s" {
			t.Errorf("a member compacts by %s %s, want periodic 1h0m0s", mode, keeps)
		}
	}
}
