// SPDX-License-Identifier: Apache-2.0

package main

import (
	"math/rand/v2"
	"slices"
	"testing"
)

func TestVerdict_IsThatOfTheWholeInterval(t *testing.T) {
	for _, tt := range []struct {
		name  string
		bound bound
		e     estimate
		want  verdict
	}{
		{"within", atMost(1.02), estimate{1.00, 0.99, 1.01}, met},
		{"within, up to the bound", atMost(1.02), estimate{1.00, 0.99, 1.02}, met},
		{"median within, and not the high end", atMost(1.02), estimate{1.011, 0.820, 1.224}, undecided},
		{"low end within, and not the median", atMost(1.02), estimate{1.114, 0.977, 1.268}, undecided},
		{"low end on the bound", atMost(1.02), estimate{1.114, 1.02, 1.268}, undecided},
		{"beyond", atMost(1.02), estimate{1.114, 1.03, 1.268}, missed},
		{"no value", atMost(1.02), estimateOf(nil), undecided},

		{"enough", atLeast(4), estimate{5.41, 4.23, 5.86}, met},
		{"enough, down to the bound", atLeast(4), estimate{5.41, 4, 5.86}, met},
		{"median too little, and not the high end", atLeast(1.5), estimate{1.49, 1.31, 1.75}, undecided},
		{"median enough, and not the low end", atLeast(1.5), estimate{1.6, 1.31, 1.75}, undecided},
		{"high end on the bound", atLeast(1.5), estimate{1.4, 1.31, 1.5}, undecided},
		{"too little", atLeast(1.5), estimate{1.4, 1.31, 1.49}, missed},
		{"no value of at least", atLeast(1.5), estimateOf(nil), undecided},
	} {
		if got, _ := tt.bound.judge(tt.e); got != tt.want {
			t.Errorf("%s: got %s; want %s", tt.name, got, tt.want)
		}
	}
}

// around returns n values between low and high.
func around(low, high float64, n int) (values []float64) {
	for i := range n {
		values = append(values, low+(high-low)*float64(i)/float64(n-1))
	}
	return values
}

func TestGoal_Judgement(t *testing.T) {
	for _, tt := range []struct {
		name   string
		bound  bound
		values []float64
		looks  int
		want   verdict
		says   string
	}{
		{"met", atMost(2), around(0.9, 1, 10), 1, met, "0.95 (0.91-0.99) times, which leaves 50.6 %"},
		{"missed", atMost(0.5), around(0.9, 1, 10), 1, missed, "0.95 (0.91-0.99) times, which is 82.2 % too high"},
		{"missed by too little", atLeast(2), around(0.9, 1, 10), 1, missed, "0.95 (0.91-0.99) times, which is 50.6 % too low"},
		{"undecided", atMost(0.95), around(0.9, 1, 10), 1, undecided, "0.95 (0.91-0.99) times in 10 rounds"},
		// Of ten values, the second and the ninth have 97.9 %, which is not enough for
		// three looks.
		{"wider for more looks", atMost(0.995), around(0.9, 1, 10), 3, undecided, "0.95 (0.90-1.00) times in 10 rounds"},
		// The lowest and the highest of five values have 93.8 %.
		{"too few rounds", atMost(2), around(0.9, 1, 5), 1, undecided, "0.95 (0.90-1.00) times in 5 rounds"},
		{"just enough rounds", atMost(2), around(0.9, 1, 6), 1, met, "0.95 (0.90-1.00) times, which leaves 50.0 %"},
	} {
		g := goal{bound: tt.bound, values: func() []float64 { return tt.values }, unit: " times", decimals: 2}
		got, says := g.judge(tt.looks)
		if got != tt.want || says != tt.says {
			t.Errorf("%s: got %s: %s; want %s: %s", tt.name, got, says, tt.want, tt.says)
		}
	}
}

// A machine that slows down during a run is no difference between two proxies.
func TestPairs_SlowRoundsCancelOut(t *testing.T) {
	a, b := []float64{100, 200, 400}, []float64{50, 100, 200}
	if got := pairs(a, b); !slices.Equal(got, []float64{2, 2, 2}) {
		t.Errorf("got %v; want 2 in each round", got)
	}
	if got := pairs(a, b[:2]); len(got) != 2 {
		t.Errorf("got %v; want only the rounds that both have", got)
	}
}

func TestLooks(t *testing.T) {
	for _, tt := range []struct {
		rounds, most int
		want         []int
	}{
		{10, 40, []int{10, 20, 40}},
		{10, 50, []int{10, 20, 40, 50}},
		{10, 10, []int{10}},
		{10, 3, []int{10}},
	} {
		if got := looks(tt.rounds, tt.most); !slices.Equal(got, tt.want) {
			t.Errorf("%d rounds and at most %d: got %v; want %v", tt.rounds, tt.most, got, tt.want)
		}
	}
}

func TestDecided_IsForGoalsOfTheMeasurement(t *testing.T) {
	with := func(of string, values ...float64) goal {
		return goal{of: of, bound: atMost(1), values: func() []float64 { return values }}
	}
	yes, no := with("get 16", around(0.5, 0.9, 10)...), with("get 64", around(0.5, 1.5, 10)...)
	for of, want := range map[string]bool{"get 16": true, "get 64": false, "list": true} {
		if got := decided([]goal{yes, no, yes}, of, 1); got != want {
			t.Errorf("%s: got %t; want %t", of, got, want)
		}
	}
}

// A difference that is not there is found in at most one of twenty comparisons, though
// each is looked at several times.
func TestGoal_LooksDoNotAddErrors(t *testing.T) {
	const comparisons = 4000
	after := looks(10, 40)
	random := rand.New(rand.NewPCG(1, 2))
	wrong := 0
	for range comparisons {
		var values []float64
		g := goal{bound: atMost(1), values: func() []float64 { return values }}
		for _, n := range after {
			for len(values) < n {
				values = append(values, 1+0.2*random.NormFloat64()) // the median is the bound
			}
			if v, _ := g.judge(len(after)); v != undecided {
				wrong++
				break
			}
		}
	}
	if got := float64(wrong) / comparisons; got > risk {
		t.Errorf("%.1f %% of comparisons were decided; want at most 5 %%", 100*got)
	}
}
