package failover

import (
	"fmt"
	"io"
	"math"
	"strings"
	"text/template"
)

// The plot's area, in pixels: the curve is drawn from left to right over the gaps, from bottom to top over the share of runs.
const left, top, width, height = 60, 40, 560, 260

var plot = template.Must(template.New("").Parse(`<svg xmlns="http://www.w3.org/2000/svg" width="660" height="360" font-family="sans-serif" font-size="12">
<rect width="660" height="360" fill="white"/>
<text x="60" y="24" font-size="14">{{.Title}}</text>
{{range .Lines}}<line x1="{{.X1}}" y1="{{.Y1}}" x2="{{.X2}}" y2="{{.Y2}}" stroke="#ddd"/><text x="{{.X}}" y="{{.Y}}" text-anchor="{{.Anchor}}">{{.Label}}</text>
{{end}}<path d="{{.Curve}}" fill="none" stroke="#1f5fa8" stroke-width="2"/>
<text x="340" y="345" text-anchor="middle">ms without an answer</text>
</svg>
`))

type gridLine struct {
	X1, Y1, X2, Y2, X, Y int
	Anchor, Label        string
}

// WriteSVG draws the share of the runs whose gap is not above x, from 0 to the longest gap. There must be one gap at least.
func WriteSVG(w io.Writer, cfg Config, results []Result) error {
	sorted := sortedGaps(results)
	most := ms(sorted[len(sorted)-1])
	// The largest of 1, 2, 5, 10 ... that makes 5 lines at least.
	step := math.Pow(10, math.Floor(math.Log10(max(most, 1))))
	for _, part := range []float64{2, 2.5, 2} {
		if most/step < 5 {
			step /= part
		}
	}
	end := step * math.Ceil(most/step)
	x := func(gap float64) int { return left + int(math.Round(width*gap/end)) }
	y := func(share float64) int { return top + int(math.Round(height*(1-share))) }

	var lines []gridLine
	for v := 0.0; v <= end+step/2; v += step {
		lines = append(lines, gridLine{x(v), top, x(v), top + height, x(v), top + height + 18, "middle", fmt.Sprintf("%g", v)})
	}
	for _, share := range []float64{0, 0.25, 0.5, 0.75, 0.9, 1} {
		lines = append(lines, gridLine{left, y(share), left + width, y(share), left - 8, y(share) + 4, "end", fmt.Sprintf("%g %%", 100*share)})
	}
	var curve strings.Builder
	fmt.Fprintf(&curve, "M%d %d", x(0), y(0))
	for i, gap := range sorted {
		fmt.Fprintf(&curve, "H%dV%d", x(ms(gap)), y(float64(i+1)/float64(len(sorted))))
	}
	title := fmt.Sprintf("%s, %d nodes, %d runs: p50 %.0f ms, p99 %.0f ms", cfg.Fault, cfg.Lab.Nodes, len(results), ms(Quantile(results, 0.5)), ms(Quantile(results, 0.99)))
	return plot.Execute(w, map[string]any{"Title": title, "Lines": lines, "Curve": curve.String()})
}
