package gossip

import (
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestAFileOfGossipKeysHasOneALine(t *testing.T) {
	key := func(n int, c string) string { return base64.StdEncoding.EncodeToString([]byte(strings.Repeat(c, n))) }
	file := filepath.Join(t.TempDir(), "key")
	for text, want := range map[string]string{
		key(32, "a"):        strings.Repeat("a", 32),
		key(32, "a") + "\n": strings.Repeat("a", 32),
		key(16, "b") + "\n" + key(24, "c") + "\n":         strings.Repeat("b", 16) + " " + strings.Repeat("c", 24),
		"\r\n" + key(16, "b") + "\r\n\r\n" + key(16, "a"): strings.Repeat("b", 16) + " " + strings.Repeat("a", 16),
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		keys, err := ReadKeys(file)
		var have []string
		for _, k := range keys {
			have = append(have, string(k))
		}
		if err != nil || strings.Join(have, " ") != want {
			t.Errorf("%q: got %q, error %v, want %q", text, have, err, want)
		}
	}
	for text, want := range map[string]string{
		"":                                 "want a key",
		" \n":                              "want a key",
		key(15, "a"):                       "key 1: want 16, 24 or 32 bytes",
		key(16, "a") + "\nnot base64":      "key 2: want",
		key(16, "a") + "\n" + key(33, "a"): "key 2: want",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if keys, err := ReadKeys(file); err == nil || !strings.Contains(err.Error(), want) || keys != nil {
			t.Errorf("%q: got %d keys, error %v, want %q", text, len(keys), err, want)
		}
	}
}
