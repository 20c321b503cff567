package agent

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

func TestFaultsNameTheirPart(t *testing.T) {
	boom := errors.New("boom")
	tests := map[string]struct {
		err  error
		want map[string]string
	}{
		"none":                        {nil, map[string]string{}},
		"of no part":                  {errors.Join(boom), map[string]string{}},
		"one":                         {in("routes", boom), map[string]string{"routes": "boom"}},
		"one that is nil":             {errors.Join(in("routes", nil), in("nftables", boom)), map[string]string{"nftables": "boom"}},
		"several, joined and wrapped": {errors.Join(errors.Join(in("a", boom)), fmt.Errorf("so: %w", in("b", boom)), boom), map[string]string{"a": "boom", "b": "boom"}},
		"the first of a part":         {errors.Join(in("a", boom), in("a", errors.New("later"))), map[string]string{"a": "boom"}},
		"several of a part":           {in("a", errors.Join(boom, boom)), map[string]string{"a": "boom; boom"}},
	}
	for name, tt := range tests {
		if d := cmp.Diff(tt.want, faults(tt.err)); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
	if text := faults(in("a", errors.New("x"+strings.Repeat("é", 500))))["a"]; len(text) > maxFault || !utf8.ValidString(text) {
		t.Errorf("%d bytes, or half a character: %s", len(text), text)
	}
	if !errors.Is(in("a", boom), boom) {
		t.Error("the cause is hidden")
	}
}
