"""What would happen: the plan, its price and its timeline, with no rank and no GPU.

Start in explain.py (`sfcompile.explain`) and predict.py (`sfcompile.simulate`). How layers add up to a step is decided
in one place, codegen/plan/step.py. text.py, html.py (with page.*) and timeline.py show an explanation as words, as a
page and as a picture; code.py explains the graph line by line.

The room is not called explain/, since the function of that name is what people import.

May import: the leaves, runtime/program, codegen/schedule, codegen/proof, codegen/plan, passes/graph, passes/report,
passes and sfcompile/capture.
"""
