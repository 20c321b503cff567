package bundle

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"regexp"
	"slices"
	"strings"
	"unicode"
)

// privateKey is one in PEM, also within a JSON string.
var privateKey = regexp.MustCompile(`(?s)-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(-----END [A-Z0-9 ]*PRIVATE KEY-----|$)`)

// cleaner is what all that gets into an archive goes through.
type cleaner struct {
	hide   []string
	redact *redactor // nil: names and addresses stay
}

// text returns a text without what must not be in the archive, nor on the terminal of who reads it.
func (c cleaner) text(s string) string {
	if c.redact == nil && harmless(s) && !slices.ContainsFunc(c.hide, func(secret string) bool { return secret != "" && strings.Contains(s, secret) }) {
		return s
	}
	s = privateKey.ReplaceAllString(s, "(a private key)")
	for _, secret := range c.hide {
		if secret != "" {
			s = strings.ReplaceAll(s, secret, "(hidden)")
		}
	}
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) && r != '\n' && r != '\t' {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if c.redact != nil {
		s = c.redact.text(s)
	}
	return s
}

// harmless reports whether there is nothing in a text to look for: most are names and addresses.
func harmless(s string) bool {
	const most = 200
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return len(s) < most && !strings.Contains(s, "-----")
}

// data returns the content of a file so. JSON that cannot be read, as where it was cut, is left out up to there.
func (c cleaner) data(as form, data []byte) ([]byte, error) {
	if as == text {
		return []byte(c.text(string(data))), nil
	}
	if len(data) == 0 {
		return nil, nil
	}
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetEscapeHTML(false)
	if as == object {
		e.SetIndent("", "  ")
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	for {
		var v any
		if err := d.Decode(&v); errors.Is(err, io.EOF) {
			return out.Bytes(), nil
		} else if err != nil {
			return out.Bytes(), errors.New("what follows was cut")
		}
		if err := e.Encode(c.value(v, "")); err != nil {
			return out.Bytes(), err
		}
	}
}

// value does so with a JSON value that is in a field.
func (c cleaner) value(v any, field string) any {
	switch v := v.(type) {
	case string:
		if c.redact != nil && personal[field] {
			return c.redact.pseudonym(person, v)
		}
		return c.text(v)
	case []any:
		for i := range v {
			v[i] = c.value(v[i], field)
		}
		return v
	case map[string]any:
		out := make(map[string]any, len(v))
		for k, inner := range v {
			key := k
			if named[field] {
				key = c.text(k) // it is a name or an address, and no name of a field
			}
			out[key] = c.value(inner, k)
		}
		return out
	}
	return v
}

// named are the fields whose keys are names or addresses.
var named = map[string]bool{
	"labels": true, "matchLabels": true, "nodes": true, "conflicts": true, "dropped": true, "refused": true, "ports": true, "pools": true,
}

// personal are the fields that say who did something.
var personal = map[string]bool{"by": true}
