package cdf

import (
	"encoding/xml"
	"io"
	"strings"
	"testing"
	"time"
)

func TestQuantileIsOneOfTheValues(t *testing.T) {
	var values []time.Duration
	for i := range 100 {
		values = append(values, time.Duration(100-i))
	}
	for _, test := range []struct {
		values []time.Duration
		q      float64
		want   time.Duration
	}{
		{nil, 0.5, 0},
		{values[:1], 0.01, 100},
		{values[:1], 1, 100},
		{values[:2], 0.5, 99},
		{values, 0.5, 50},
		{values, 0.9, 90},
		{values, 0.99, 99},
		{values, 1, 100},
	} {
		if got := Quantile(test.values, test.q); got != test.want {
			t.Errorf("quantile %v of %d values: %d, want %d", test.q, len(test.values), got, test.want)
		}
	}
}

func TestACurveEndsBelowTheTopWhereSomeHaveNoValue(t *testing.T) {
	const ms = time.Millisecond
	for _, test := range []struct {
		name   string
		curves []Curve
		want   []string
		legend int
	}{
		{"one step a value", []Curve{{"all", []time.Duration{20 * ms, 10 * ms}, 0}}, []string{"M60 300H340V170H620V40"}, 0},
		{"half of them", []Curve{{"half", []time.Duration{20 * ms}, 2}, {"none", nil, 2}}, []string{"M60 300H620V170H620", "M60 300H620"}, 2},
		{"no values at all", []Curve{{}}, []string{"M60 300"}, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			var svg strings.Builder
			if err := WriteSVG(&svg, Plot{"title", "axis", test.curves}); err != nil {
				t.Fatal(err)
			}
			for _, path := range test.want {
				if !strings.Contains(svg.String(), `d="`+path+`"`) {
					t.Errorf("no path %s in\n%s", path, &svg)
				}
			}
			if got := strings.Count(svg.String(), `x="610"`); got != test.legend {
				t.Errorf("%d names in the legend, want %d", got, test.legend)
			}
			for d := xml.NewDecoder(strings.NewReader(svg.String())); ; {
				if _, err := d.Token(); err == io.EOF {
					break
				} else if err != nil {
					t.Fatalf("the plot is no XML: %v\n%s", err, &svg)
				}
			}
		})
	}
}
