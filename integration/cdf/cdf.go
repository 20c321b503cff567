package cdf

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"text/template"
	"time"
)

// Quantile returns the smallest of the values that a share of q of them does not exceed (nearest rank), q above 0 and
// up to 1; 0 without values.
func Quantile(values []time.Duration, q float64) time.Duration {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	rank := int(math.Ceil(q * float64(len(sorted))))
	return sorted[min(max(rank, 1), len(sorted))-1]
}

// Milliseconds returns d in ms, to the microsecond.
func Milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// Curve is a distribution: the share of Of whose value is not above x.
type Curve struct {
	Name   string // for the legend, which a plot of one curve does without
	Values []time.Duration
	Of     int // how many there are, with those that have no value; 0: as many as Values
}

// Plot is what WriteSVG draws: the curves from left to right over the values in ms, from bottom to top over the share.
type Plot struct {
	Title, Axis string // Axis says what the values are
	Curves      []Curve
}

// The plot's area, in pixels.
const left, top, width, height = 60, 40, 560, 260

// colors are told apart by people who do not see red and green as well (Okabe and Ito).
var colors = []string{"#1f5fa8", "#d55e00", "#009e73", "#cc79a7", "#e69f00"}

var picture = template.Must(template.New("").Parse(`<svg xmlns="http://www.w3.org/2000/svg" width="660" height="360" font-family="sans-serif" font-size="12">
<rect width="660" height="360" fill="white"/>
<text x="60" y="24" font-size="14">{{.Title}}</text>
{{range .Lines}}<line x1="{{.X1}}" y1="{{.Y1}}" x2="{{.X2}}" y2="{{.Y2}}" stroke="#ddd"/><text x="{{.X}}" y="{{.Y}}" text-anchor="{{.Anchor}}">{{.Label}}</text>
{{end}}{{range .Curves}}<path d="{{.Path}}" fill="none" stroke="{{.Color}}" stroke-width="2"/>
{{end}}{{range .Legend}}<text x="610" y="{{.Y}}" text-anchor="end" fill="{{.Color}}">{{.Name}}</text>
{{end}}<text x="340" y="345" text-anchor="middle">{{.Axis}}</text>
</svg>
`))

type gridLine struct {
	X1, Y1, X2, Y2, X, Y int
	Anchor, Label        string
}

type path struct{ Path, Color string }

type label struct {
	Name, Color string
	Y           int
}

// WriteSVG draws the plot, from 0 to the largest value of all curves.
func WriteSVG(w io.Writer, p Plot) error {
	most := 0.0
	for _, c := range p.Curves {
		for _, v := range c.Values {
			most = max(most, Milliseconds(v))
		}
	}
	step := gridStep(most)
	end := step * math.Ceil(max(most, step)/step)
	x := func(v float64) int { return left + int(math.Round(width*v/end)) }
	y := func(share float64) int { return top + int(math.Round(height*(1-share))) }

	var lines []gridLine
	for v := 0.0; v <= end+step/2; v += step {
		lines = append(lines, gridLine{x(v), top, x(v), top + height, x(v), top + height + 18, "middle", fmt.Sprintf("%g", v)})
	}
	for _, share := range []float64{0, 0.25, 0.5, 0.75, 0.9, 1} {
		lines = append(lines, gridLine{left, y(share), left + width, y(share), left - 8, y(share) + 4, "end", fmt.Sprintf("%g %%", 100*share)})
	}
	var curves []path
	var legend []label
	for i, c := range p.Curves {
		color := colors[i%len(colors)]
		curves = append(curves, path{steps(c, x, y), color})
		if len(p.Curves) > 1 {
			legend = append(legend, label{c.Name, color, top + height - 12 - 16*(len(p.Curves)-1-i)})
		}
	}
	return picture.Execute(w, map[string]any{"Title": p.Title, "Axis": p.Axis, "Lines": lines, "Curves": curves, "Legend": legend})
}

// gridStep returns the largest of 1, 2, 5, 10 ... that makes 5 lines at least.
func gridStep(most float64) float64 {
	step := math.Pow(10, math.Floor(math.Log10(max(most, 1))))
	for _, part := range []float64{2, 2.5, 2} {
		if most/step < 5 {
			step /= part
		}
	}
	return step
}

// steps returns the path of a curve. It goes on to the right edge, where it stays below the top when some have no
// value.
func steps(c Curve, x func(float64) int, y func(float64) int) string {
	all := max(c.Of, len(c.Values))
	var b strings.Builder
	fmt.Fprintf(&b, "M%d %d", x(0), y(0))
	last := y(0)
	for i, v := range slices.Sorted(slices.Values(c.Values)) {
		if at := y(float64(i+1) / float64(all)); at != last { // what is not a pixel higher is not seen
			fmt.Fprintf(&b, "H%dV%d", x(Milliseconds(v)), at)
			last = at
		}
	}
	if len(c.Values) < all {
		fmt.Fprintf(&b, "H%d", left+width)
	}
	return b.String()
}
