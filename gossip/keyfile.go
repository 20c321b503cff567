package gossip

import (
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"strings"
)

// ReadKeys reads a file for Config.Keys: keys that `openssl rand -base64 32` makes, one a line, and at least one.
func ReadKeys(file string) ([][]byte, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	keys, err := parseKeys(string(b))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return keys, nil
}

func parseKeys(text string) (keys [][]byte, err error) {
	const form = "16, 24 or 32 bytes in base64, as `openssl rand -base64 32` makes them"
	for i, field := range strings.Fields(text) {
		key, err := base64.StdEncoding.DecodeString(field)
		if err != nil || len(key) != 16 && len(key) != 24 && len(key) != 32 {
			return nil, fmt.Errorf("key %d: want %s", i+1, form)
		}
		keys = append(keys, key)
	}
	if len(keys) == 0 {
		return nil, errors.New("want a key, " + form)
	}
	return keys, nil
}
