package store

import (
	"net/url"
	"testing"
)

func TestAnIPv6AddressWithoutBracketsIsAnEndpoint(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"https://fd00::1:8483":          "https://[fd00::1]:8483",
		"fd00::1:8483":                  "[fd00::1]:8483",
		"https://::1:8483":              "https://[::1]:8483",
		"https://fd00::192.0.2.1:8483":  "https://[fd00::192.0.2.1]:8483",
		"https://[fd00::1]:8483":        "https://[fd00::1]:8483",
		"[fd00::1]:8483":                "[fd00::1]:8483",
		"https://10.0.0.1:8483":         "https://10.0.0.1:8483",
		"10.0.0.1:2379":                 "10.0.0.1:2379",
		"https://etcd.example:2379":     "https://etcd.example:2379",
		"https://etcd.example":          "https://etcd.example",
		"https://$(EGRET_ETCD):8483":    "https://$(EGRET_ETCD):8483",
		"unix:///run/etcd.sock":         "unix:///run/etcd.sock",
		"https://u:p@[fd00::1]:8483":    "https://u:p@[fd00::1]:8483",
		"https://fd00::1:8483/a/path:x": "https://fd00::1:8483/a/path:x", // no endpoint of etcd has a path
		"":                              "",
	} {
		if got := Endpoint(text); got != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
		if again := Endpoint(want); again != want {
			t.Errorf("%q becomes %q when it is read again", want, again)
		}
	}
	if u, err := url.Parse(Endpoint("https://fd00::1:8483")); err != nil || u.Hostname() != "fd00::1" || u.Port() != "8483" {
		t.Errorf("as a URL: %v, %v", u, err)
	}
}
